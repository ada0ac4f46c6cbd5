"""Two processes equal one whose batch normalization sees the same half-batches."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from camdistill import tags
from camdistill.cli import main
from camdistill.data.modules import ShapesData
from camdistill.data.views import Augment, draw_view, view_images
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.losses import cross_entropy, map_distance, soft_targets_kl
from camdistill.distill.optimization import Optimization
from camdistill.experiments.training.lightning_cli import read_table
from camdistill.explain.gradcam import explain_images
from camdistill.networks.teachers import NetworkSpec
from camdistill.report.tensorboard import read_scalars

EPOCHS, BATCH, DATA = 2, 16, {"train": 50, "val": 21, "test": 19}
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def run(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "camdistill", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def by_halves(teacher_file: Path) -> tuple[dict[str, Tensor], list[float]]:
    """One process that averages the gradients of two half-batches; the losses of its steps."""
    module = DistilledExplainer(
        NetworkSpec("resnet20", str(teacher_file), {"classes": 8}),
        NetworkSpec("shallow_cnn", args={"channels": [6, 8], "strides": [2, 2]}),
    )
    data = ShapesData(**DATA, batch_size=BATCH)  # type: ignore[arg-type]
    data.setup("fit")
    loader, student = data.train_dataloader(), module.student.train()
    recipe = Optimization(lr=0.05).configure(student.network, EPOCHS * len(loader))
    optimizer, losses = recipe["optimizer"], []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            total = 0.0
            view = draw_view(Augment("pad", flip=True), batch.ids, (32, 32), seed=0, epoch=epoch)
            images = view_images(batch.pixels, view).float() / 255
            images = images.contiguous(memory_format=torch.channels_last)
            buffers = {name: value.clone() for name, value in student.named_buffers()}
            for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
                student.load_state_dict(student.state_dict() | buffers, strict=False)
                told = explain_images(module.teacher, images[half], ["layer3"])
                own = explain_images(student, images[half], ["stage2"], told.classes, grad="full")
                loss = (
                    0.1 * cross_entropy(own.logits, batch.labels[half]).mean()
                    + 0.9 * soft_targets_kl(own.logits, told.logits, 4.0).mean()
                    + 20 * map_distance(own.maps["stage2"], told.maps["layer3"]).mean()
                )
                (loss / 2).backward()
                total += float(loss.detach()) / 2
                if not half.start:  # the first process's statistics are what is kept
                    first = {name: value.clone() for name, value in student.named_buffers()}
            student.load_state_dict(student.state_dict() | first, strict=False)
            optimizer.step()
            recipe["lr_scheduler"]["scheduler"].step()  # type: ignore[index]
            losses.append(total)
    return student.network.state_dict(), losses


@pytest.mark.slow
def test_two_processes_equal_one_that_sees_the_same_half_batches(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    path = config(
        data={**DATA, "batch_size": BATCH},
        trainer={"max_epochs": EPOCHS},
        cached=False,
        augment={"crop": "pad", "flip": True},
    )
    folder = tmp_path / "two" / "version_0"
    last = str(folder / "checkpoints" / "last.ckpt")
    run(tmp_path, "fit", "-c", str(path), "--run", str(folder.parent), *TWO)

    # one folder, and each file once
    assert [file.name for file in folder.parent.iterdir()] == ["version_0"]
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert set(names) - set(events) <= {
        "checkpoints",
        "checkpoints/last.ckpt",
        "config.yaml",
        "hparams.yaml",
        "student.safetensors",
        "training.log",
    }
    assert not list((tmp_path / "runs").glob("*"))

    weights, losses = by_halves(tmp_path / "teacher.safetensors")
    trained = load_file(folder / "student.safetensors")
    assert trained.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=name)
    curves = read_scalars(folder)
    assert [value for _, value in curves[tags.LOSS_TRAIN]] == pytest.approx(losses, rel=1e-4)

    # 21 and 19 images in shards of 8: some only fill up, and none counts twice
    one = ["-c", str(path), "--run", str(folder.parent), "--ckpt_path", last]
    assert main(["test", *one]) == 0
    single = read_table(folder)
    run(tmp_path, "test", *one, *TWO)
    shared = read_table(folder)
    np.testing.assert_array_equal(shared.ids, single.ids)
    assert len(shared) == 19
    for name, column in single.columns.items():
        exact = name in ("student.accuracy", "student.agreement")
        np.testing.assert_allclose(
            shared.columns[name], column, rtol=0, atol=0 if exact else 2e-5, err_msg=name
        )
    assert main(["validate", *one]) == 0
    validated = read_scalars(folder / "validate")
    for tag in (tags.ACCURACY_STUDENT, tags.AGREEMENT, tags.PEARSON, tags.COSINE, tags.SKILL):
        assert curves[tag][-1][1] == pytest.approx(validated[tag][-1][1], abs=2e-5), tag
