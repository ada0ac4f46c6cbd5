"""The teacher's logits and maps of a whole set of images, for both orientations, made once.

A cache lies in a folder whose name is a hash of everything that decides its content: the teacher's
weights and normalization, the images, the layers, the precision. Opening it checks every file, and
asks the live teacher about a random sample of images.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from camdistill.data.datasets import ImageSet
from camdistill.distill.teacher_maps_plan import (
    CachePlan,
    Precision,
    Quantity,
    likeliest_classes,
    query_teacher,
)
from camdistill.errors import UserError
from camdistill.explain.maps import relu
from camdistill.networks.teachers import Teacher
from camdistill.store.array_files import (
    ArrayWriter,
    CacheError,
    CacheKey,
    lock_cache,
    open_arrays,
    pack,
    report_write_errors,
    unpack,
)
from camdistill.types import Labels, Logits

Progress = Callable[[int, int], None]

SAMPLE_SIZE = 64  # images asked of the live teacher when a cache is opened
MAX_DISAGREEING = 3  # of the sample: near ties and ReLUs at zero flip with the shape of a batch
# Relative L2 errors of an image's logits and of its maps. Another teacher's are about 1. Measured
# on 500 CIFAR-10 images, ResNet-20 and -56: in bfloat16 at most 0.03 in logits, and in maps 0.01,
# 0.07 and 0.09 in the median (0.02, 0.21, 0.38 for 1 in 100) at layer3, 2, 1; in float32 at most
# 0.02.
TOLERANCE = {"float32": (0.01, 0.1), "bfloat16": (0.1, 0.5)}
PAUSE = 10.0  # seconds between the points from which a killed build goes on

log = logging.getLogger(__name__)


class TeacherCache:
    """What a teacher says of every image of a set, looked up by the image's id.

    Maps are stored in float16, each divided by its largest absolute value, which is kept in
    float32: the error is at most 2^-12 of that value. Logits are float32. All is memory-mapped.

    Attributes:
        plan: What is stored.
        folder: Where.
        mean_map_by_layer: Mean ReLU Grad-CAM over the images as stored (not mirrored), float32
            [h, w]: the mean-map control of `measure.fidelity`.
    """

    def __init__(
        self, plan: CachePlan, folder: Path, ids: Labels, rows: Labels, arrays: dict[str, Tensor]
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.mean_map_by_layer: dict[str, Float[Tensor, "height width"]] = {
            layer: arrays[f"mean_map/{index}"] for index, layer in enumerate(plan.layers)
        }
        self._ids, self._rows, self._arrays = ids, rows, arrays

    @classmethod
    def open_or_build(
        cls,
        teacher: Teacher,
        image_set: ImageSet,
        layers: Sequence[str],
        *,
        root: Path,
        quantities: Sequence[Quantity] = ("grad_cam",),
        classes: int = 1,
        flips: bool = True,
        precision: Precision = "float32",
        p: float = 2.0,
        batch_size: int = 256,
        progress: Progress | None = None,
    ) -> "TeacherCache":
        """The cache of a teacher and a set of images; made where there is none that holds.

        Processes that want the same cache wait for the first one. A cache that is damaged, or that
        the live teacher contradicts, is made anew, with a line in the log.

        Args:
            teacher: It runs on the device where it is.
            image_set: The images as stored; ids are unique.
            layers: Names of the teacher's layers.
            root: Folder of caches; made if missing.
            quantities: What to store besides the Grad-CAMs.
            classes: Number of the likeliest classes in these.
            flips: Store the mirrored images too.
            precision: "bfloat16" is faster where the hardware has it. It moves a ResNet's maps by
                1 % at the last layer and by 5 to 10 % at inner ones (median relative L2 error).
            p: Power of attention maps.
            batch_size: Images a forward pass.
            progress: Called with the number of images done and of all.

        Raises:
            UserError: When the folder can't be written, the disk is full, there is no image, or the
                teacher does not repeat its own maps.
        """
        stored_quantities: set[Quantity] = {"grad_cam", *quantities}
        classes = min(classes, teacher.classes)
        names = tuple(dict.fromkeys(layers))
        plan = CachePlan(names, tuple(sorted(stored_quantities)), flips, precision, p, classes)
        if not len(image_set):
            raise UserError("no images to ask the teacher about; check the data's folder")
        if len(np.unique(image_set.ids)) < len(image_set):
            raise ValueError("two images of the set have the same id")
        key = plan.key(teacher, image_set)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = Path(root) / f"teacher-{digest[:24]}"
        with report_write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with lock_cache(folder):
                if folder.exists():
                    try:
                        return cls._open(plan, folder, key, teacher, image_set)
                    except CacheError as reason:
                        log.warning("teacher cache %s: %s; making it anew", folder, reason)
                        shutil.rmtree(folder)
                _build(plan, ArrayWriter(folder, key), teacher, image_set, batch_size, progress)
                try:
                    return cls._open(plan, folder, key, teacher, image_set)
                except CacheError as reason:
                    shutil.rmtree(folder)
                    raise UserError(
                        f"the teacher does not repeat its own maps ({reason}); "
                        "train with the live teacher"
                    ) from None

    @classmethod
    def _open(
        cls, plan: CachePlan, folder: Path, key: CacheKey, teacher: Teacher, image_set: ImageSet
    ) -> "TeacherCache":
        arrays = open_arrays(folder, key)
        ids, rows = torch.sort(torch.from_numpy(np.array(image_set.ids, dtype=np.int64)))
        cache = cls(plan, folder, ids, rows, arrays)
        cache.verify(teacher, image_set)
        return cache

    def __len__(self) -> int:
        return len(self._ids)

    def to(self, device: torch.device | str) -> "TeacherCache":
        """The same cache held in a device's memory."""
        arrays = {name: array.to(device) for name, array in self._arrays.items()}
        ids, rows = self._ids.to(device), self._rows.to(device)
        return TeacherCache(self.plan, self.folder, ids, rows, arrays)

    def lookup(
        self,
        ids: Labels,
        flip: Bool[Tensor, "batch"],
        quantity: Quantity = "grad_cam",
        layers: Sequence[str] | None = None,
    ) -> tuple[Logits, dict[str, Tensor]]:
        """The teacher's logits and maps of some images, on the device of the ids.

        Args:
            ids: The images' numbers.
            flip: True asks for the mirrored image; its maps are those of the mirrored image.
            quantity: Which maps.
            layers: Names of the layers; None is all that are stored.

        Returns:
            Logits, and by layer float32 maps [B, h, w] ([B, C, h, w] for "class_maps", and for the
            Grad-CAMs of several classes).

        Raises:
            ValueError: For something that is not stored. (Held in a GPU's memory, the cache answers
                NaN logits to an unknown id instead: raising would wait for the device.)
        """
        layer_names = self.plan.layers if layers is None else tuple(dict.fromkeys(layers))
        if quantity not in self.plan.quantities:
            raise ValueError(f"{quantity!r} is not stored; there are {self.plan.quantities}")
        if unknown := sorted(set(layer_names) - set(self.plan.layers)):
            raise ValueError(f"{unknown} are not stored; there are {self.plan.layers}")
        device = ids.device
        ids, flip = ids.to(self._ids.device), flip.to(self._ids.device)
        position = torch.searchsorted(self._ids, ids).clamp_(max=len(self._ids) - 1)
        is_stored = self._ids[position] == ids
        if not self.plan.flips:
            is_stored &= ~flip
        if is_stored.device.type == "cpu" and not bool(is_stored.all()):
            missing, mirrored = int(ids[~is_stored][0]), bool(flip[~is_stored][0])
            raise ValueError(f"no image {missing} (mirrored: {mirrored}) in {self.folder}")
        index = self._rows[position] * self.plan.orientations + (flip if self.plan.flips else 0)
        logits = self._arrays["logits"].flatten(0, 1)[index]
        logits = torch.where(is_stored[:, None], logits, torch.full_like(logits, torch.nan))
        maps_by_layer = {}
        for layer in layer_names:
            number = self.plan.layers.index(layer)
            packed, scale = (
                self._arrays[f"{quantity}/{number}{part}"].flatten(0, 1)[index]
                for part in ("", "/scale")
            )
            maps_by_layer[layer] = unpack(packed.to(device), scale.to(device))
        return logits.to(device), maps_by_layer

    def verify(self, teacher: Teacher, image_set: ImageSet) -> None:
        """Compare a random sample of 64 images, each in one orientation, with the live teacher.

        At most 3 may be off by more than `TOLERANCE` in their logits or any map: rounding moves a
        few, another teacher moves all.

        Raises:
            CacheError: When more do.
        """
        generator = np.random.default_rng(list(self.folder.name.encode()))
        positions = np.sort(generator.permutation(len(image_set))[:SAMPLE_SIZE])
        batch = image_set.batch(positions)
        mirror = generator.random(len(positions)) < (0.5 if self.plan.flips else 0)
        flip = torch.from_numpy(mirror)
        pixels = torch.where(flip[:, None, None, None], batch.pixels.flip(-1), batch.pixels)
        logits, _ = self.lookup(batch.ids, flip)
        live_outputs = query_teacher(
            self.plan, teacher, pixels, likeliest_classes(logits, self.plan.classes)
        )
        logit_tolerance, map_tolerance = TOLERANCE[self.plan.precision]
        agrees = _relative_error(logits, live_outputs["logits"]) <= logit_tolerance
        for quantity in self.plan.quantities:
            _, maps_by_layer = self.lookup(batch.ids, flip, quantity)
            for number, maps in enumerate(maps_by_layer.values()):
                agrees &= (
                    _relative_error(maps, live_outputs[f"{quantity}/{number}"]) <= map_tolerance
                )
        wrong_count = int((~agrees).sum())
        if wrong_count > min(MAX_DISAGREEING, len(positions) // 4):
            raise CacheError(
                f"the live teacher differs on {wrong_count} of {len(positions)} images"
            )


def _build(
    plan: CachePlan,
    draft: ArrayWriter,
    teacher: Teacher,
    image_set: ImageSet,
    batch_size: int,
    progress: Progress | None,
) -> None:
    count, start = len(image_set), time.monotonic()
    size = (image_set.pixels.shape[2], image_set.pixels.shape[3])
    fast_teacher = teacher.fuse_batch_norm(size, keep=plan.layers).to(
        memory_format=torch.channels_last
    )
    log.info("teacher cache: %d of %d images to make", count - draft.done, count)
    saved_at = start
    try:
        while draft.done < count:
            positions = np.arange(draft.done, min(draft.done + batch_size, count))
            pixels = image_set.batch(positions).pixels
            for orientation in range(plan.orientations):
                values = query_teacher(
                    plan, fast_teacher, pixels.flip(-1) if orientation else pixels
                )
                for name, value in _pack_outputs(values).items():
                    if name not in draft.arrays:
                        shape = (count, plan.orientations, *value.shape[1:])
                        draft.allocate(name, shape, value.dtype)
                    draft.arrays[name][positions[0] : positions[-1] + 1, orientation] = value
            draft.done += len(positions)
            if progress is not None:
                progress(draft.done, count)
            if time.monotonic() - saved_at > PAUSE:
                draft.save_progress()
                saved_at = time.monotonic()
        draft.finish(_mean_maps(plan, draft))
    except OSError:
        draft.discard()
        raise
    log.info("teacher cache: made in %.0f s", time.monotonic() - start)


def _pack_outputs(values: dict[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    arrays: dict[str, NDArray[np.generic]] = {"logits": values["logits"].numpy()}
    for name, value in values.items():
        if name != "logits":
            packed, scale = pack(value)
            arrays[name], arrays[f"{name}/scale"] = packed.numpy(), scale.numpy()
    return arrays


def _mean_maps(plan: CachePlan, draft: ArrayWriter) -> dict[str, NDArray[np.float32]]:
    means = {}
    for number in range(len(plan.layers)):
        packed, scale = (draft.arrays[f"grad_cam/{number}{part}"] for part in ("", "/scale"))
        total = np.zeros(packed.shape[-2:], np.float64)
        for start in range(0, len(packed), 1024):
            maps = unpack(
                *(torch.from_numpy(part[start : start + 1024, 0]) for part in (packed, scale))
            )
            first = maps if maps.dim() == 3 else maps[:, 0]
            total += relu(first).sum(0, dtype=torch.float64).numpy()
        means[f"mean_map/{number}"] = (total / len(packed)).astype(np.float32)
    return means


def _relative_error(stored: Tensor, live: Tensor) -> Tensor:
    """L2 error per image, relative to its own size or, where that is more, the median image's."""
    difference: Tensor = torch.linalg.vector_norm((stored.cpu() - live).flatten(1), dim=1)
    size: Tensor = torch.linalg.vector_norm(live.flatten(1), dim=1)
    size = size.maximum(size.median()).clamp_min(torch.finfo(torch.float32).tiny)
    return difference / size
