"""Mistakes of `explain`: networks, weights, layers, images."""

from pathlib import Path

import pytest

from mistakes import Mistake, check_mistake

ALONE = "explain --teacher shallow_cnn --size 16 --images images/test/c0"
STUDENT = "runs/tiny/version_0/student.safetensors"
MISTAKES = {
    "class below 0": Mistake(
        "explain --teacher shallow_cnn --images images/test/c0 --classes -1",
        r"class -1 is below 0; classes are counted from 0: give 0 or more",
    ),
    "no count": Mistake(f"{ALONE} --count 0", r"count is 0; give 1 or more images"),
    "part of a count": Mistake(f"{ALONE} --count 1.5", r"count is '1\.5'; it takes a whole number"),
    "size of nothing": Mistake(f"{ALONE} --size 0", r"size is 0; "),
    "size in words": Mistake(
        f"{ALONE} --size big", r"size is 'big'; it takes a whole number or null"
    ),
    "unknown method": Mistake(
        f"{ALONE} --method grad_cma", r"no method 'grad_cma'; nearest: 'grad_cam'"
    ),
    "class that is no number": Mistake(
        f"{ALONE} --classes 1.5", r"no class '1\.5'; give its number"
    ),
    "call that is not made": Mistake(
        f"{ALONE} --layers stage1#7", r"calls 'stage1' 1 time, so the last is 'stage1#0'"
    ),
    "call without a number": Mistake(
        f"{ALONE} --layers stage1#x", r"after # comes the number of the call"
    ),
    "pair of layers of one network": Mistake(
        f"{ALONE} --layers stage1:stage2", r"no layer 'stage1:stage2' .*nearest: 'stage2'"
    ),
    "layer without a student's": Mistake(
        f"explain --checkpoint {STUDENT} --images images --layers a:b:c",
        r"name the student's and the teacher's, such as",
    ),
    "empty folder of results": Mistake(
        f"{ALONE} --out ''", r"--out is empty; give a value, or leave it out"
    ),
    "option of another command": Mistake(
        f"{ALONE} --list-layers", r"no option 'list-layers'; nearest: 'layers'"
    ),
    "option that no command has": Mistake(
        f"{ALONE} --zzz 1", r"no option 'zzz'; --help shows them"
    ),
    "trust without a package": Mistake(f"{ALONE} --trust", r"--trust stands without its value"),
    "folder as weights": Mistake(
        f"{ALONE} --weights images", r"'images' is a folder, not a file of weights"
    ),
    "empty file as weights": Mistake(
        f"{ALONE} --weights nothing.safetensors", r"is empty \(0 bytes\); copy or download it again"
    ),
    "noise as weights": Mistake(
        f"{ALONE} --weights noise.pt",
        r"neither safetensors nor a torch file; give a file written by",
    ),
    "config as weights": Mistake(
        f"{ALONE} --weights tiny.yaml", r"'tiny\.yaml' is neither safetensors nor a torch file"
    ),
    "list as weights": Mistake(
        f"{ALONE} --weights list.pt", r"no weights in 'list\.pt': it holds a list"
    ),
    "optimizer as weights": Mistake(
        f"{ALONE} --weights optimizer.pt", r"it holds 'epoch', 'optimizer'; give a file"
    ),
    "arrays as weights": Mistake(
        f"{ALONE} --weights maps.npz", r"'maps\.npz' is an archive of 'maps\.npy', not weights"
    ),
    "pointer as weights": Mistake(
        f"{ALONE} --weights lfs.pth", r"is a Git LFS pointer, not weights; run `git lfs pull`"
    ),
    "weights in no folder": Mistake(
        f"{ALONE} --weights nowhere/x.pt", r"there is no folder 'nowhere'; check the path"
    ),
    "weights of other sizes": Mistake(
        f"{ALONE} --weights t.safetensors",
        r"doesn't fit shallow_cnn: it lacks 15 of its 32 weights",
    ),
    "network without a name": Mistake(
        "explain --teacher . --images images",
        r"'\.' is no class path; give package\.module\.Network",
    ),
    "network in capitals": Mistake(
        "explain --teacher ResNet18 --images images", r"no network 'ResNet18'; nearest: 'resnet18'"
    ),
    "file for a network": Mistake(
        "explain --teacher resnet18.pth --images images",
        r"there is no module 'resnet18'; check the name",
    ),
    "class that needs arguments": Mistake(
        "explain --teacher torch.nn.Linear --images images",
        r"needs the argument 'in_features'; give it in a config's args, or",
    ),
    "class that is no network": Mistake(
        "explain --teacher own_functions.Other --images images",
        r"is a class but not a torch\.nn\.Module",
    ),
    "number for a network": Mistake(
        "explain --teacher own_functions.number --images images",
        r"of type int and can't be called: name a torch\.nn\.Module",
    ),
    "function that makes no network": Mistake(
        "explain --teacher own_functions.takes_nothing --images images",
        r"made a int, not a torch\.nn\.Module",
    ),
    "function that is not there": Mistake(
        "explain --teacher own_functions.nope --images images",
        r"no 'nope' in module 'own_functions'; there are",
    ),
    "module that is not Python": Mistake(
        "explain --teacher broken_code.f --images images",
        r"can't import 'broken_code\.f': invalid syntax .*mend that module",
    ),
    "module that needs another": Mistake(
        "explain --teacher stops.f --images images",
        r"it needs 'nothing_of_this_name', not installed",
    ),
    "module that stops": Mistake(
        "explain --teacher undefined.f --images images",
        r"can't import 'undefined\.f': name 'y' is not defined",
    ),
    "network without a head": Mistake(
        "explain --teacher torch.nn.Identity --images images",
        r"no linear layer or 1x1 convolution as its head; add one",
    ),
    "no picture at all": Mistake(
        "explain --teacher shallow_cnn --images nothing",
        r"no images in 'nothing'; supported",
    ),
    "text for a picture": Mistake(
        "explain --teacher shallow_cnn --size 16 --images tiny.yaml",
        r"can't read 'tiny\.yaml' .*replace or remove the file",
    ),
    "broken picture": Mistake(
        "explain --teacher shallow_cnn --size 16 --images broken.png", r"can't read 'broken\.png'"
    ),
    "unknown data set": Mistake(
        "explain --teacher shallow_cnn --data cifar11", r"no folder 'cifar11'"
    ),
    "size that the data set has not": Mistake(
        "explain --teacher shallow_cnn --data cifar10 --size 16",
        r"cifar10's images are 32 pixels wide, and 16 are asked for",
    ),
    "images twice": Mistake(
        "explain --teacher shallow_cnn --data shapes --images images",
        r"give either --images FILE_OR_FOLDER \.\.\. or --data",
    ),
    "images too small for a map": Mistake(
        f"explain --checkpoint {STUDENT} --images images --size 1",
        r"has no spatial size: ask for a layer",
    ),
    "tabs in a config": Mistake("explain -c tabs.yaml", r"tabs\.yaml, line 2 is not YAML"),
    "empty config": Mistake(
        "explain -c empty.yaml", r"empty\.yaml is empty; a config has options by name"
    ),
    "config of bytes": Mistake("explain -c bytes.yaml", r"bytes\.yaml is not text, so no config"),
    "config that is a number": Mistake(
        "explain -c number.yaml", r"number\.yaml holds a int; a config has options by name"
    ),
    "alias of nothing": Mistake("explain -c alias.yaml", r"undefined alias 'x'"),
    "config with code": Mistake(
        "explain -c object.yaml", r"could not determine a constructor for the tag"
    ),
    "folder as a config": Mistake("explain -c images", r"images is a folder, not a config"),
    "config without a name": Mistake(
        "explain -c", r"--config stands without its value; give one after it"
    ),
    "config of fit": Mistake(
        "explain -c tiny.yaml", r"is a config of `camdistill fit`; explain has no option"
    ),
    "group of options that is not there": Mistake(
        "explain --help nope", r"explain has no group of options 'nope'"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line_with_its_cure(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_mistake(MISTAKES[name], folder, capsys)
