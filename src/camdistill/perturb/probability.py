"""What logits say: probabilities, and which label they predict.

The probabilities of several logits are their softmax. A single logit is that of a yes-or-no
question (a sigmoid network): its probability is its sigmoid, the softmax of one number being 1
whatever the number is. A single logit predicts label 1 where it is above 0, else label 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from camdistill.types import Labels, Logits


def probabilities(logits: Logits) -> Float[Tensor, "batch classes"]:
    """The softmax of several logits; the sigmoid of a single one."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def log_probabilities(logits: Logits) -> Float[Tensor, "batch classes"]:
    """The logarithm of `probabilities`, exact for small ones."""
    return F.logsigmoid(logits) if logits.shape[1] == 1 else logits.log_softmax(1)


def expand_single_logit(
    logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, "batch labels"]:
    """One logit z as the two logits 0 and z, whose softmax is (1 - sigmoid(z), sigmoid(z)).

    Several logits are returned as they are. What compares distributions or predictions needs both
    answers: the only column of a single logit is always the largest.
    """
    if logits.shape[1] != 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], 1)


def predict_labels(logits: Logits) -> Labels:
    """The class of the largest logit; of a single one, 1 where it is above 0, else 0."""
    return expand_single_logit(logits).argmax(1)


def label_count(logits: int) -> int:
    """How many labels so many logits tell apart: a single one tells two."""
    return 2 if logits == 1 else logits
