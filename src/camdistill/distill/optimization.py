"""How parameters are fitted: one small recipe, shared by students and teachers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from camdistill.errors import check_number

START, END = 1 / 25, 1e-4  # of the highest rate, where one-cycle begins and ends


@dataclass(frozen=True)
class Optimization:
    """An optimizer with its learning-rate schedule, set step by step over the whole training.

    Args:
        optimizer: "sgd" with Nesterov momentum, or "adamw".
        lr: The highest learning rate.
        momentum: Momentum of SGD; the first beta of AdamW.
        weight_decay: On weights of two or more axes; norms and biases are never decayed.
        schedule: "one_cycle" rises from lr / 25 and falls to nearly 0 along cosines; "cosine" rises
            linearly; "constant" stays after the rise.
        warmup: The part of the training that the rise takes, in [0, 1).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    warmup: float = 0.15

    def __post_init__(self) -> None:
        check_number("lr", self.lr, "(0, inf)", "a learning rate is above 0: try 0.1 for sgd")
        check_number("weight_decay", self.weight_decay, "[0, inf)", "give 0 or more")
        check_number("warmup", self.warmup, "[0, 1)", "it is a part of the training, in [0, 1)")
        check_number("momentum", self.momentum, "[0, 1)")

    def lr_factor(self, progress: float) -> float:
        """The learning rate as a part of the highest one, at a progress in [0, 1]."""
        if progress < self.warmup:
            rise_progress = progress / self.warmup
            if self.schedule == "one_cycle":
                return START + (1 - START) * (1 - math.cos(math.pi * rise_progress)) / 2
            return max(rise_progress, END)
        if self.schedule == "constant":
            return 1.0
        fall_progress = (progress - self.warmup) / (1 - self.warmup)
        return END + (1 - END) * (1 + math.cos(math.pi * min(fall_progress, 1.0))) / 2

    def build_optimizer(
        self, weights: Sequence[Tensor], norms_and_biases: Sequence[Tensor]
    ) -> torch.optim.Optimizer:
        """The optimizer alone, for a loop that sets the rate itself.

        Args:
            weights: Weights, which decay.
            norms_and_biases: Norms and biases, which don't.
        """
        groups = [
            {"params": list(weights), "weight_decay": self.weight_decay},
            {"params": list(norms_and_biases), "weight_decay": 0.0},
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0
            )
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))

    def configure(self, network: nn.Module, steps: int) -> OptimizerLRSchedulerConfig:
        """What `configure_optimizers` returns for a network that is fitted for so many steps."""
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = self.build_optimizer(
            [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.lr_factor(step / max(steps, 1))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
