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

from camdistill.claims.claim import ClaimSetup
from camdistill.claims.networks.claim_training import fit
from camdistill.data.loading import BatchSampler
from camdistill.distill.optimization import Optimization
from camdistill.distill.training import build_with_seed, to_plain_data
from camdistill.errors import UserError
from camdistill.networks.fitting import load_weights
from camdistill.networks.weights import read_weights, save_safetensors
from camdistill.types import PerImage

Examples = tuple[Tensor, ...]
"""Tensors whose first axes are the same examples."""
NetworkT = TypeVar("NetworkT", bound=nn.Module)

VERSION = 1  # goes up when the same settings would give other weights


@dataclass(frozen=True)
class SmallNetworkRecipe:
    """How a little network is fitted.

    Attributes:
        epochs: Times that every example is seen.
        batch: Examples a step.
        optimization: Optimizer and schedule.
    """

    epochs: int
    batch: int = 128
    optimization: Optimization = field(
        default_factory=lambda: Optimization("adamw", lr=3e-3, weight_decay=0.05)
    )


def fit_or_load(
    setup: ClaimSetup,
    name: str,
    build: Callable[[], NetworkT],
    examples: Callable[[], Examples],
    loss: Callable[[NetworkT, Examples], PerImage],
    *,
    recipe: SmallNetworkRecipe,
    settings: Mapping[str, object],
    seed: int | None = None,
) -> NetworkT:
    """A frozen network in eval mode: fitted once for each setting, then read from the folder.

    Args:
        setup: Setup whose folder stores it.
        name: What to call it; with the settings it makes the file's name.
        build: The network before, by torch's global generator, which is seeded for it. What has
            no gradient in it stays as it is.
        examples: What it learns from; asked for only where there is no file.
        loss: One value an example.
        recipe: How it is fitted.
        settings: All else that decides the weights: the data's fingerprint, what `loss` uses.
        seed: Seed of the start and the order; None is the setup's.
    """
    seed = setup.seed if seed is None else seed
    all_settings = {
        "version": VERSION,
        "recipe": to_plain_data(asdict(recipe)),
        "seed": seed,
        **to_plain_data(settings),
    }
    settings_json = json.dumps(all_settings, sort_keys=True)
    network = build_with_seed(seed, build)
    digest = hashlib.sha256(settings_json.encode()).hexdigest()[:10]
    path = setup.folder / f"{name}-{digest}.safetensors"
    if not _try_load(network, path, settings_json):
        setup.announce(f"training {name}")
        batches = Batches(examples(), recipe.batch, seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of what a loss draws
            fit(setup, _FitModule(network.train(), loss, recipe), batches, recipe.epochs)
        save_safetensors(path, network.state_dict(), {"settings": settings_json})
    return network.to(setup.device).eval().requires_grad_(False)


def _try_load(network: nn.Module, path: Path, settings_json: str) -> bool:
    """Whether the folder had the weights; a damaged file is made again."""
    if not path.is_file():
        return False
    with contextlib.suppress(UserError):
        weights = read_weights(path)
        if weights.metadata.get("settings") == settings_json:
            load_weights(network, weights)
            return True
    return False


class Batches:
    """Examples in an order of (seed, epoch); Lightning finds `sampler.set_epoch` by its name."""

    batch_sampler = None  # Lightning asks for it

    def __init__(self, examples: Examples, batch: int, seed: int) -> None:
        self.examples = examples
        self.sampler = BatchSampler(len(examples[0]), batch, train=True, seed=seed)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Examples]:
        for positions, _ in self.sampler:
            rows = torch.from_numpy(positions).to(self.examples[0].device)
            yield tuple(part[rows] for part in self.examples)


class _FitModule(LightningModule):
    """One loss, one recipe."""

    def __init__(
        self,
        network: NetworkT,
        loss: Callable[[NetworkT, Examples], PerImage],
        recipe: SmallNetworkRecipe,
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
        return self.recipe.optimization.configure(self.network, steps)
