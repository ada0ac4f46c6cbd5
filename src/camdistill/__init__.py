"""Distilled explainers and layer analysis with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camdistill.distill.checkpoints import load
    from camdistill.explain.gradcam import grad_cam

__version__ = "0.2.0"
__all__ = ["grad_cam", "load"]

_HOMES = {"grad_cam": "camdistill.explain.gradcam", "load": "camdistill.distill.checkpoints"}


def __getattr__(name: str) -> object:
    # Imported when asked for: torch and Lightning take seconds, `camdistill --help` needs neither.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'camdistill' has no attribute '{name}'")
