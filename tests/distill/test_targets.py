"""What the teacher says: in which precision it is kept, and who says it when it is live."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from camdistill.data.datasets import shapes_set
from camdistill.data.modules import ShapesData
from camdistill.data.shapes import Shapes
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.distill.targets import open_shared_cache
from camdistill.distill.teacher_cache import TeacherCache
from camdistill.distill.transfer import LayerPair, Transfer
from camdistill.errors import UserError
from camdistill.explain.gradcam import explain_images

Explainer = Callable[..., DistilledExplainer]
Data = Callable[..., ShapesData]
Trainers = Callable[..., Trainer]
INNER = Transfer(pairs=[LayerPair("stage2", "layer1"), LayerPair()])


class Look(Callback):
    """Notes what the first step finds: the precision of caches, and the live teacher."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistilledExplainer)
        self.precisions = {name: c.plan.precision for name, c in pl_module._caches.items()}
        self.live = list(pl_module._live_teachers)


@pytest.mark.parametrize(
    ("transfer", "trained", "kept"),
    [
        (Transfer(), "bf16-mixed", "bfloat16"),
        (Transfer(pairs=[LayerPair("stage4", "layer3")]), "bf16-mixed", "bfloat16"),
        (INNER, "bf16-mixed", "float32"),
        (Transfer(pairs=[LayerPair(None, "layer2")]), "bf16-mixed", "float32"),
        (Transfer(), "32-true", "float32"),
    ],
)
def test_only_the_last_layer_is_kept_in_bfloat16(
    explainer: Explainer,
    shapes: Data,
    trainer_of: Trainers,
    transfer: Transfer,
    trained: str,
    kept: str,
) -> None:
    look = Look()
    trainer = trainer_of(look, precision=trained, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(explainer(transfer=transfer), shapes())
    assert look.precisions == {"train": kept, "val": kept}


def test_live_teacher_is_fused_says_the_same_and_is_nobodys_part(
    explainer: Explainer, shapes: Data, trainer_of: Trainers
) -> None:
    look, layers = Look(), ["layer1.0.bn1", "layer2.0.relu#0", "layer3"]
    pairs = [LayerPair(f"stage{n + 2}", layer) for n, layer in enumerate(layers)]
    module = explainer(cached=False, transfer=Transfer(pairs=pairs))
    trainer_of(look, limit_train_batches=1, limit_val_batches=0).fit(module, shapes())
    (live,) = look.live
    norms = [name for name, m in live.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ["layer1.0.bn1"], "the one whose own output is asked for"
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    told, expected = (explain_images(teacher, images, layers) for teacher in (live, module.teacher))
    torch.testing.assert_close(told.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for layer in layers:
        largest = float(expected.maps[layer].abs().max())
        torch.testing.assert_close(
            told.maps[layer], expected.maps[layer], rtol=1e-3, atol=1e-3 * largest
        )
    assert live not in list(module.modules())
    assert module._live_teachers == []


def one_of_two(said: list[bool], *, first: bool) -> Trainer:
    """One of two processes' trainers; what the first broadcasts reaches the second."""

    def broadcast(value: bool) -> bool:
        if first:
            said.append(value)
        return said[0]

    trainer = Mock(spec=Trainer, is_global_zero=first, precision="32-true")
    trainer.strategy.broadcast = broadcast
    return trainer


def test_a_teacher_that_fails_stops_all_processes_at_once(
    explainer: Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> TeacherCache:
        raise OSError("the disk is gone")

    def ask(*, first: bool) -> TeacherCache:
        return open_shared_cache(
            one_of_two(said, first=first),
            explainer().teacher,
            shapes_set(Shapes("train", 4)),
            ["layer3"],
            what="training images",
            root=tmp_path,
            quantities=[],
            flips=False,
            p=2.0,
        )

    said: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "open_or_build", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            ask(first=True)
        assert said == [False]
        with pytest.raises(UserError, match=r"first process could not .* training images"):
            ask(first=False)
    said.clear()
    assert torch.equal(
        *(
            ask(first=first).lookup(torch.arange(4), torch.zeros(4, dtype=torch.bool))[0]
            for first in (True, False)
        )
    )
