"""Probabilities and predicted labels from logits.

The probabilities of several logits are their softmax. A single logit is that of a yes-or-no
question (a sigmoid network). Its probability is its sigmoid, because the softmax of one number is
always 1. A single logit predicts label 1 where it is above 0, else label 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.types import Labels, Logits


def probabilities(logits: Logits) -> Float[Tensor, "batch classes"]:
    """Returns the softmax of several logits, or the sigmoid of a single one."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def log_probabilities(logits: Logits) -> Float[Tensor, "batch classes"]:
    """Returns the logarithm of `probabilities`, exact for small ones."""
    return F.logsigmoid(logits) if logits.shape[1] == 1 else logits.log_softmax(1)


def expand_single_logit(
    logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch labels"]:
    """Returns a single logit z as the logits 0 and z, with softmax (1 - sigmoid(z), sigmoid(z)).

    Several logits are returned as they are. A comparison of distributions or predictions needs both
    labels: the only column of a single logit is always the largest.
    """
    if logits.shape[1] != 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], 1)


def predict_labels(logits: Logits) -> Labels:
    """Returns the class of the largest logit; for a single logit, 1 where it is above 0, else 0."""
    return expand_single_logit(logits).argmax(1)


def label_count(logits: int) -> int:
    """Returns the number of labels that so many logits distinguish: two for a single one."""
    return 2 if logits == 1 else logits
