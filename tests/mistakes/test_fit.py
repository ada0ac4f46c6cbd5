"""Mistakes of the four loops and of `study`: options, groups, checkpoints."""

from pathlib import Path

import pytest

from mistakes import Mistake, check_mistake

FIT = "fit -c tiny.yaml"
STUDENT = "runs/tiny/version_0/student.safetensors"
LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
STUDY = "study --base tiny.yaml --arms '{a: {}}'"
MISTAKES = {
    "weight of the labels below 0": Mistake(f"{FIT} --model.ce -0.5", r"ce is -0\.5; .*0 or more"),
    "decay of 1": Mistake(f"{FIT} --model.ema 1", r"ema is 1\.0; give a decay in \(0, 1\)"),
    "mistyped optimizer": Mistake(
        f"{FIT} --model.optimization.optimizer adm",
        r"optimizer is 'adm'; it takes 'sgd', 'adamw'; nearest: 'adamw'",
    ),
    "warm-up of twice the training": Mistake(
        f"{FIT} --model.optimization.warmup 2", r"warmup is 2\.0; "
    ),
    "weight decay below 0": Mistake(
        f"{FIT} --model.optimization.weight_decay -1", r"weight_decay is -1\.0; give 0 or more"
    ),
    "momentum of 2": Mistake(f"{FIT} --model.optimization.momentum 2", r"momentum is 2\.0; "),
    "learning rate that is no number": Mistake(
        f"{FIT} --model.optimization.lr nan", r"lr is '?nan'?; "
    ),
    "no learning rate": Mistake(
        f"{FIT} --model.optimization.lr null",
        r"optimization\.lr is null; leave it out for its default, or give a number$",
    ),
    "no options of the trainer": Mistake(
        f"{FIT} --trainer null", r"trainer is null; leave it out for its defaults"
    ),
    "pair without a weight": Mistake(
        f"{FIT} --model.transfer.pairs '[{{student: stage1, teacher: stage1, weight: null}}]'",
        r"model\.transfer\.pairs\.weight is null; leave it out for its default",
    ),
    "unknown quantity": Mistake(
        f"{FIT} --model.transfer.quantity nope",
        r"quantity is 'nope'; it takes 'grad_cam', 'attention', 'class_maps'",
    ),
    "no class to transfer": Mistake(
        f"{FIT} --model.transfer.classes 0",
        r"transfer\.classes is 0; give 1 \(the top class\) or more",
    ),
    "power of 0": Mistake(
        f"{FIT} --model.transfer.p 0 --model.transfer.quantity attention",
        r"p is 0\.0; a power of attention maps is at least 1",
    ),
    "no pair of layers": Mistake(
        f"{FIT} --model.transfer.pairs []", r"transfer\.pairs is empty; leave it out"
    ),
    "pair that is a word": Mistake(
        f"{FIT} --model.transfer.pairs [stage1]", r"pairs is 'stage1'; it takes named values"
    ),
    "mistyped pair": Mistake(
        f"{FIT} --model.transfer.pairs '[{{student: stage1, teecher: stage1}}]'",
        r"an entry with 'student' has another name in it",
    ),
    "pair of a weight below 0": Mistake(
        f"{FIT} --model.transfer.pairs '[{{student: stage1, weight: -1}}]'",
        r"a pair's weight is -1\.0; give 0 or more",
    ),
    "layer in two pairs": Mistake(
        f"{FIT} --model.transfer.pairs "
        "'[{student: stage1, teacher: stage1}, {student: stage1, teacher: stage2}]'",
        r"two of transfer\.pairs name the student's layer 'stage1'",
    ),
    "word for a teacher": Mistake(
        f"{FIT} --model.teacher resnet20",
        r"model\.teacher is 'resnet20'; it takes named values, such as \{name: resnet20\}",
    ),
    "number for augmentation": Mistake(
        f"{FIT} --model.augment 3", r"model\.augment is '3'; it takes named values"
    ),
    "mistyped argument of a network": Mistake(
        f"{FIT} --model.teacher.args '{{chanels: [4, 6]}}'",
        r"no argument 'chanels' in shallow_cnn; nearest: 'channels'",
    ),
    "lists of two lengths": Mistake(
        f"{FIT} --model.teacher.args '{{channels: [4]}}'", r"channels has 1 numbers and strides 5"
    ),
    "mean of one number": Mistake(
        f"{FIT} --model.teacher.mean [0.5]",
        r"model\.teacher\.mean is \[0\.5\]; it takes a list of 3",
    ),
    "deviation of 0": Mistake(f"{FIT} --model.teacher.std '[0, 1, 1]'", r"std is 0\.0; "),
    "channels of 0": Mistake(
        f"{FIT} --model.student.args '{{channels: [4, 0], strides: [1, 2]}}'",
        r"channels has 0: every number is 1 or more",
    ),
    "even kernel": Mistake(
        f"{FIT} --model.student.args '{{channels: [4, 6], strides: [1, 2], kernel_size: 4}}'",
        r"kernel_size is 4: take an odd number",
    ),
    "student of gray images": Mistake(
        f"{FIT} --model.student.args '{{channels: [4, 6], strides: [1, 2], in_channels: 1}}'",
        r"the student can't run on an image of 3x16x16 .*give another --data\.size",
    ),
    "weights of a wider student": Mistake(
        f"{FIT} --model.student.weights {STUDENT} "
        "--model.student.args '{channels: [5, 6], strides: [1, 2]}'",
        r"has 'stage1\.conv\.weight' of shape",
    ),
    "switch that is no switch": Mistake(
        f"{FIT} --model.cached maybe", r"model\.cached is 'maybe'; it takes true or false"
    ),
    "unknown model": Mistake(
        f"{FIT} --model Nope", r"model names the class 'Nope', which is not there; there are"
    ),
    "model that is no model": Mistake(
        f"{FIT} --model own_functions.Other",
        r"model names 'own_functions\.Other', which is no LightningModule",
    ),
    "data that are no data": Mistake(
        f"{FIT} --data own_functions.Other",
        r"data names 'own_functions\.Other', which is no LightningDataModule",
    ),
    "images of no pixels": Mistake(f"{FIT} --data.size 0", r"size is 0; "),
    "images of one pixel": Mistake(
        f"{FIT} --data.size 1", r"no layer with a spatial output for images of 1x1: give larger"
    ),
    "folder to go on from": Mistake(
        f"{FIT} --ckpt_path images", r"'images' is a folder, not a file of weights"
    ),
    "config of a ranking beside": Mistake(f"{FIT} -c nope.yaml", r"no config file nope\.yaml"),
    "config without -c": Mistake("fit tiny.yaml", r"'tiny\.yaml' belongs to no option"),
    "test of no images": Mistake(
        f"test -c tiny.yaml --ckpt_path {LAST} --data.root nothing",
        r"no images in 'nothing'; supported",
    ),
    "validation without a run": Mistake(
        "validate -c tiny.yaml --ckpt_path last --run nope",
        r"no checkpoint to go on from under runs/nope",
    ),
    "validation of a list": Mistake(
        "validate -c tiny.yaml --ckpt_path list.pt", r"no weights in 'list\.pt'"
    ),
    "prediction from a picture": Mistake(
        "predict -c tiny.yaml --ckpt_path broken.png",
        r"'broken\.png' is neither safetensors nor a torch file",
    ),
    "prediction with a mistyped group": Mistake(
        f"predict -c tiny.yaml --ckpt_path {LAST} --modle.beta 1",
        r"no option 'modle\.beta'; nearest: 'model'",
    ),
    "study of nothing": Mistake(
        "study", r"base, arms are missing; give --base or set it in the config"
    ),
    "arms that are a word": Mistake(
        "study --base tiny.yaml --arms nope",
        r"arms is 'nope'; it takes named values, such as \{a: 1\}",
    ),
    "arm that is a number": Mistake(
        "study --base tiny.yaml --arms '{a: 3}'", r"arms is '3'; it takes named values"
    ),
    "seed below 0": Mistake(f"{STUDY} --seeds -1", r"a seed is -1; seeds are 0 or more"),
    "seed twice": Mistake(f"{STUDY} --seeds 0 0", r"(seeds are \[0, 0\]|0.*twice|each once)"),
    "study of a folder": Mistake("study --base images --arms '{a: {}}'", r"no config images"),
    "arm of another type": Mistake(
        "study --base tiny.yaml --seeds 0 --arms '{a: {model.beta: x}}'",
        r"model\.beta is 'x'; it takes a number",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_with_its_cure(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(MISTAKES[name], folder, capsys)
