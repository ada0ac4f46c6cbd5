"""What the teacher says: in which precision it is kept."""

from collections.abc import Callable

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer

from camdistill.data.modules import ShapesData
from camdistill.distill.module import DistilledExplainer
from camdistill.distill.transfer import LayerPair, Transfer

Explainer = Callable[..., DistilledExplainer]
Data = Callable[..., ShapesData]
Trainers = Callable[..., Trainer]
INNER = Transfer(pairs=[LayerPair("stage2", "layer1"), LayerPair()])


class Look(Callback):
    """Notes what the first step finds: the precision of caches."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistilledExplainer)
        self.precisions = {name: c.plan.precision for name, c in pl_module._caches.items()}


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
