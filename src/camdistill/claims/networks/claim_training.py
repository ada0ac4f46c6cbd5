"""Little networks that experiments train, kept so that a second start has them."""

import hashlib
import json
import signal
import warnings
from collections.abc import Iterable

from pytorch_lightning import LightningModule, Trainer

from camdistill.claims.claim import ClaimSetup
from camdistill.data.modules import ImageData, ShapesData
from camdistill.distill.checkpoints import load, write_checkpoint
from camdistill.distill.classifier import Classifier
from camdistill.distill.distilled_explainer import DistilledExplainer
from camdistill.networks.teachers import Preprocessed


def train_or_load(
    setup: ClaimSetup,
    name: str,
    module: Classifier | DistilledExplainer,
    data: ImageData,
    *,
    epochs: int,
) -> Preprocessed:
    """A network that was fitted to some data: trained once for each setting, then read.

    Args:
        setup: Setup whose folder stores it.
        name: What to call it; with the settings it makes the file's name.
        module: How it is trained: what, with which loss, from which seed.
        data: What on.
        epochs: Passes over it.

    Returns:
        The network, in eval mode, frozen, on the lab's device.
    """
    path = setup.folder / f"{name}-{_digest(module, data, epochs)}.safetensors"
    if not path.exists():
        setup.announce(f"training {name}")
        fit(setup, module, data, epochs)
        write_checkpoint(module, path)
    return load(path).network.eval().requires_grad_(False).to(setup.device)


def _digest(module: Classifier | DistilledExplainer, data: ImageData, epochs: int) -> str:
    if isinstance(data, ShapesData):  # known without drawing
        images = data.shapes("train").fingerprint
    else:
        data.setup("fit")
        images = data.fingerprints["train"]
    order = [data.seed, data.batch_size, data.limit or 0, epochs]
    settings_json = json.dumps([module.settings, images, order], sort_keys=True, default=str)
    digest = hashlib.sha256(settings_json.encode())
    if "network" in dict(module.named_children()):  # it starts from weights that were put there
        for value in module.fitted.state_dict().values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:10]


def fit(
    setup: ClaimSetup, module: LightningModule, data: ImageData | Iterable[object], epochs: int
) -> None:
    """Fits a module on the lab's device, to a data module or to batches."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="gpu" if setup.device != "cpu" else "cpu",
        devices=1,
        precision="bf16-mixed",
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            trainer.fit(module, data)
    except SystemExit as end:
        # What Lightning makes of Ctrl-C, having switched it off for the rest of the process.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None
