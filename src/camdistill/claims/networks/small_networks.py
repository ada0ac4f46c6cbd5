"""Little networks with a loss of their own, fitted in seconds and kept for a second start."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from camdistill.claims.claim import Lab
from camdistill.claims.networks.claim_training import fit
from camdistill.data.loading import Order
from camdistill.distill.optimization import Optimisation
from camdistill.distill.training import plain, seeded
from camdistill.errors import UserError
from camdistill.networks.fitting import load_state
from camdistill.networks.weights import read_weights, save_safetensors
from camdistill.types import PerImage

Examples = tuple[Tensor, ...]
"""Tensors whose first axes are the same examples."""
NetworkT = TypeVar("NetworkT", bound=nn.Module)

VERSION = 1  # goes up when the same settings would give other weights


@dataclass(frozen=True)
class Recipe:
    """How a little network is fitted.

    Attributes:
        epochs: Times that every example is seen.
        batch: Examples a step.
        optimisation: Optimiser and schedule.
    """

    epochs: int
    batch: int = 128
    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation("adamw", lr=3e-3, weight_decay=0.05)
    )


def fitted(
    lab: Lab,
    name: str,
    build: Callable[[], NetworkT],
    examples: Callable[[], Examples],
    loss: Callable[[NetworkT, Examples], PerImage],
    *,
    recipe: Recipe,
    settings: Mapping[str, object],
    seed: int | None = None,
) -> NetworkT:
    """A frozen network in eval mode: fitted once for each setting, then read from the folder.

    Args:
        lab: Whose folder keeps it.
        name: What to call it; with the settings it makes the file's name.
        build: The network before, by torch's global generator, which is seeded for it. What has
            no gradient in it stays as it is.
        examples: What it learns from; asked for only where there is no file.
        loss: One value an example.
        recipe: How it is fitted.
        settings: All else that decides the weights: the data's fingerprint, what `loss` uses.
        seed: Of the start and the order; None is the lab's.
    """
    seed = lab.seed if seed is None else seed
    known = {"version": VERSION, "recipe": plain(asdict(recipe)), "seed": seed, **plain(settings)}
    said = json.dumps(known, sort_keys=True)
    network = seeded(seed, build)
    digest = hashlib.sha256(said.encode()).hexdigest()[:10]
    path = lab.folder / f"{name}-{digest}.safetensors"
    if not _kept(network, path, said):
        lab.tell(f"training {name}")
        batches = Batches(examples(), recipe.batch, seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of what a loss draws
            fit(lab, _Fitting(network.train(), loss, recipe), batches, recipe.epochs)
        save_safetensors(path, network.state_dict(), {"settings": said})
    return network.to(lab.device).eval().requires_grad_(False)


def _kept(network: nn.Module, path: Path, said: str) -> bool:
    """Whether the folder had the weights; a damaged file is made again."""
    if not path.is_file():
        return False
    with contextlib.suppress(UserError):
        weights = read_weights(path)
        if weights.metadata.get("settings") == said:
            load_state(network, weights)
            return True
    return False


class Batches:
    """Examples in an order of (seed, epoch); Lightning finds `sampler.set_epoch` by its name."""

    batch_sampler = None  # Lightning asks for it

    def __init__(self, examples: Examples, batch: int, seed: int) -> None:
        self.examples = examples
        self.sampler = Order(len(examples[0]), batch, train=True, seed=seed)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Examples]:
        for positions, _ in self.sampler:
            rows = torch.from_numpy(positions).to(self.examples[0].device)
            yield tuple(part[rows] for part in self.examples)


class _Fitting(LightningModule):
    """One loss, one recipe."""

    def __init__(
        self, network: NetworkT, loss: Callable[[NetworkT, Examples], PerImage], recipe: Recipe
    ) -> None:
        super().__init__()
        self.network, self.loss, self.recipe = network, loss, recipe
        self.to(memory_format=torch.channels_last)

    def training_step(self, examples: Examples, number: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.network, examples).mean()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe over the whole training."""
        steps = int(self.trainer.estimated_stepping_batches)
        return self.recipe.optimisation.configure(self.network, steps)
