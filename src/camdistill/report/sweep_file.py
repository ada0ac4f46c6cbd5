"""A sweep and its file: one that was stopped or killed goes on, one that is whole isn't repeated.

Hours of forwards come before the first picture of an analysis. What they gave is small and merges
exactly, so it is written beside the report every minute and when the sweep ends, however it ends.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from camdistill.errors import UserError
from camdistill.layers.sweep.layer_sweep import LayerSweep
from camdistill.layers.sweep.sweep_state import load_state, save_state
from camdistill.networks.capture import unwrap
from camdistill.report.analysis_data import Subject
from camdistill.report.file_manifest import SWEEP, Written
from camdistill.report.results import versions

BATCH = 64  # images in a forward, and in a group of the unbiased CKA
EVERY = 60.0  # seconds of work that a killed process loses, at most
MEASURED_AS = 2  # goes up when the same images would give other numbers
_OF_WHAT = "of"  # the tensor that holds the fingerprint

Seen = Callable[[int, int], None]


class KeptSweep:
    """The state of one sweep in a file.

    Attributes:
        file: Which may not exist.
        restored: Images that were not looked at again.
        problem: Why the file can't be written; empty when it can.

    Args:
        written: List of what stands in the report's folder.
        fingerprint: Of networks and images: a state of others is not taken.
    """

    def __init__(self, written: Written, fingerprint: str) -> None:
        self.file = written.folder / SWEEP
        self._written = written
        self.restored = 0
        self.problem = ""
        self._of = torch.tensor(list(fingerprint.encode()), dtype=torch.uint8)

    def restore(self, looking: LayerSweep) -> None:
        """Puts what is in the file into a sweep that has seen nothing, if it is of the same."""
        try:
            found = load_state(self.file)
            of = found.pop(_OF_WHAT, None)
            if of is None or not torch.equal(of, self._of):
                return
            if found.keys() == looking.state_dict().keys():
                looking.load_state_dict(found)
        except UserError:
            # None is there, or a damaged one, or one of other layers: it is made anew.
            return
        self.restored = looking.images

    def keep(self, looking: LayerSweep) -> None:
        """Writes the file, whole or not at all; a sweep goes on without it."""
        try:
            self._written.add(self.file)
            save_state(self.file, {**looking.state_dict(), _OF_WHAT: self._of})
            self.problem = ""
        except (UserError, OSError) as error:
            self.problem = str(error)


def look(looking: LayerSweep, subject: Subject, kept: KeptSweep, seen: Seen) -> bool:
    """Looks at all images that a kept sweep hasn't seen; whether that was interrupted.

    Args:
        looking: A sweep that has seen nothing.
        subject: The images.
        kept: Its file.
        seen: Called after each batch with the images seen and their whole number.

    Raises:
        KeyboardInterrupt: Before the first batch was seen.
    """
    order, labels = subject.order, subject.images.labels
    kept.restore(looking)
    saved, written = time.monotonic(), looking.images
    try:
        for start in range(looking.images, len(order), BATCH):
            part = order[start : start + BATCH]
            looking.update(
                subject.fetch(part), torch.from_numpy(part), torch.from_numpy(labels[part])
            )
            seen(looking.images, len(order))
            if time.monotonic() - saved > EVERY:
                kept.keep(looking)
                saved, written = time.monotonic(), looking.images
    except KeyboardInterrupt:
        if not looking.images:
            raise
        return True
    finally:
        if looking.images > written:
            kept.keep(looking)
    return False


def fingerprint(networks: Mapping[str, nn.Module], subject: Subject) -> str:
    """sha256 of all that a sweep's numbers depend on, but for its layers and options.

    That is the networks' structure and values, the images and their labels and order, and the
    versions of what computes.
    """
    what = [MEASURED_AS, versions(), subject.device, subject.channels]
    digest = hashlib.sha256(json.dumps(what).encode())
    for name, network in networks.items():
        digest.update(f"{name} {unwrap(network)}".encode())
        # A frozen teacher's network is not among its registered modules.
        for held in (network, unwrap(network)):
            for path, value in chain(held.named_parameters(), held.named_buffers()):
                digest.update(f"{path} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(_bytes(value))
    images = subject.images
    digest.update(f"{images.fingerprint} {images.pixels.shape}".encode())
    if not images.fingerprint:
        digest.update(images.pixels[np.arange(len(images))].tobytes())
    for column in (subject.order, images.labels[subject.order]):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
