"""The file of a sweep: it resumes after a stop, and a finished sweep isn't repeated.

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
from camdistill.layers.sweep.sweep_state import load_sweep_state, save_sweep_state
from camdistill.networks.capture import unwrap
from camdistill.report.analysis_data import AnalysisData
from camdistill.report.file_manifest import SWEEP, FileManifest
from camdistill.report.results import package_versions

BATCH = 64  # images in a forward, and in a group of the unbiased CKA
SAVE_INTERVAL = 60.0  # seconds of work that a killed process loses, at most
SWEEP_VERSION = 2  # goes up when the same images would give other numbers
_FINGERPRINT_KEY = "of"  # the tensor that holds the fingerprint

BatchCallback = Callable[[int, int], None]


class SweepFile:
    """The state of one sweep in a file.

    Attributes:
        file: Which may not exist.
        restored: Images that were not looked at again.
        problem: Why the file can't be written; empty when it can.

    Args:
        manifest: List of what stands in the report's folder.
        fingerprint: Fingerprint of networks and images: a state of others is not taken.
    """

    def __init__(self, manifest: FileManifest, fingerprint: str) -> None:
        self.file = manifest.folder / SWEEP
        self._manifest = manifest
        self.restored = 0
        self.problem = ""
        self._fingerprint = torch.tensor(list(fingerprint.encode()), dtype=torch.uint8)

    def restore(self, layer_sweep: LayerSweep) -> None:
        """Puts what is in the file into a sweep that has seen nothing, if it is of the same."""
        try:
            tensors = load_sweep_state(self.file)
            saved_fingerprint = tensors.pop(_FINGERPRINT_KEY, None)
            if saved_fingerprint is None or not torch.equal(saved_fingerprint, self._fingerprint):
                return
            if tensors.keys() == layer_sweep.state_dict().keys():
                layer_sweep.load_state_dict(tensors)
        except UserError:
            # None is there, or a damaged one, or one of other layers: it is made anew.
            return
        self.restored = layer_sweep.images

    def save(self, layer_sweep: LayerSweep) -> None:
        """Writes the file, whole or not at all; a sweep goes on without it."""
        try:
            self._manifest.add(self.file)
            save_sweep_state(
                self.file, {**layer_sweep.state_dict(), _FINGERPRINT_KEY: self._fingerprint}
            )
            self.problem = ""
        except (UserError, OSError) as error:
            self.problem = str(error)


def run_sweep(
    layer_sweep: LayerSweep, dataset: AnalysisData, sweep_file: SweepFile, on_batch: BatchCallback
) -> bool:
    """Looks at all images that a kept sweep hasn't seen; whether that was interrupted.

    Args:
        layer_sweep: A sweep that has seen nothing.
        dataset: The images.
        sweep_file: Its file.
        on_batch: Called after each batch with the images seen and their whole number.

    Raises:
        KeyboardInterrupt: Before the first batch was seen.
    """
    order, labels = dataset.order, dataset.images.labels
    sweep_file.restore(layer_sweep)
    last_save, saved_images = time.monotonic(), layer_sweep.images
    try:
        for start in range(layer_sweep.images, len(order), BATCH):
            positions = order[start : start + BATCH]
            layer_sweep.update(
                dataset.fetch(positions),
                torch.from_numpy(positions),
                torch.from_numpy(labels[positions]),
            )
            on_batch(layer_sweep.images, len(order))
            if time.monotonic() - last_save > SAVE_INTERVAL:
                sweep_file.save(layer_sweep)
                last_save, saved_images = time.monotonic(), layer_sweep.images
    except KeyboardInterrupt:
        if not layer_sweep.images:
            raise
        return True
    finally:
        if layer_sweep.images > saved_images:
            sweep_file.save(layer_sweep)
    return False


def sweep_fingerprint(networks: Mapping[str, nn.Module], dataset: AnalysisData) -> str:
    """sha256 of all that a sweep's numbers depend on, but for its layers and options.

    That is the networks' structure and values, the images and their labels and order, and the
    versions of what computes.
    """
    settings = [SWEEP_VERSION, package_versions(), dataset.device, dataset.channels]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, network in networks.items():
        digest.update(f"{name} {unwrap(network)}".encode())
        # A frozen teacher's network is not among its registered modules.
        for module in (network, unwrap(network)):
            for path, value in chain(module.named_parameters(), module.named_buffers()):
                digest.update(f"{path} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(_tensor_bytes(value))
    images = dataset.images
    digest.update(f"{images.fingerprint} {images.pixels.shape}".encode())
    if not images.fingerprint:
        digest.update(images.pixels[np.arange(len(images))].tobytes())
    for column in (dataset.order, images.labels[dataset.order]):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _tensor_bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
