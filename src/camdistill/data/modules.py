"""LightningDataModules: procedural shapes, CIFAR, any image folder."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, NamedTuple

import pytorch_lightning as pl

from camdistill.data.cache import OnBroken
from camdistill.data.datasets import ImageSet, carve, limit_set, load_cifar, load_folder, shapes_set
from camdistill.data.folders import (
    Layout,
    Split,
    check_test_folder,
    find_classes,
    find_layout,
)
from camdistill.data.loading import BatchSampler, Loader
from camdistill.data.shapes import Shapes
from camdistill.data.shapes_scene import Task
from camdistill.errors import UserError
from camdistill.store.atomic_files import check_memory, expand_home

_log = logging.getLogger(__name__)


class Carving(NamedTuple):
    """How test images are carved from a folder that has none apart.

    Attributes:
        split_seed: Which they are.
        test_fraction: Their share, or their number.
    """

    split_seed: int = 0
    test_fraction: float = 0.1


class ImageData(pl.LightningDataModule, ABC):
    """What all data have in common: three sets, one order, batches of `camdistill.types.Batch`.

    Attributes:
        train_set: After `setup("fit")`.
        val_set: After `setup("fit")` or `setup("validate")`.
        test_set: After `setup("test")` or `setup("predict")`, and no earlier.
    """

    def __init__(self, *, batch_size: int, seed: int, split_seed: int, limit: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; give 1 or more images")
        for name, value in (("seed", seed), ("split_seed", split_seed)):
            if value < 0:
                raise UserError(f"data.{name} is {value}; give 0 or more")
        if limit is not None and limit < 1:
            raise UserError(f"data.limit is {limit}; give 1 or more images, or null for all")
        self.batch_size = batch_size
        self.seed = seed
        self.split_seed = split_seed
        self.limit = limit
        self.train_set: ImageSet | None = None
        self.val_set: ImageSet | None = None
        self.test_set: ImageSet | None = None

    @property
    def carving(self) -> Carving:
        """What decides which images test, where these are carved."""
        return Carving()

    @abstractmethod
    def load_fit_sets(self) -> tuple[ImageSet, ImageSet]:
        """The training set (before `limit`) and the validation set."""

    @abstractmethod
    def load_test_set(self) -> ImageSet:
        """The test set."""

    def check_test_set(self) -> None:
        """Checks that there will be images to test on: before a training, not after it.

        Raises:
            UserError: There will be none.
        """

    def setup(self, stage: str) -> None:
        """Load what a stage needs: the test set is touched by test and predict alone."""
        if stage in ("fit", "validate") and self.val_set is None:
            train, self.val_set = self.load_fit_sets()
            self.train_set = limit_set(train, self.limit, self.split_seed)
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = self.load_test_set()

    def _any_loaded_set(self) -> ImageSet:
        images = self.train_set or self.test_set
        if images is None:
            raise ValueError("call setup() first")
        return images

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for images without labels."""
        return self._any_loaded_set().classes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self._any_loaded_set().size

    @property
    def fingerprints(self) -> dict[str, str]:
        """The sets that are loaded, by the sha256 of the whole that each was cut from."""
        sets = {"train": self.train_set, "val": self.val_set, "test": self.test_set}
        return {name: images.fingerprint for name, images in sets.items() if images is not None}

    def loader(self, images: ImageSet, *, train: bool = False) -> Loader:
        """Batches of any set in this module's way."""
        return Loader(
            images, BatchSampler(len(images), self.batch_size, train=train, seed=self.seed)
        )

    def train_dataloader(self) -> Loader:
        """Shuffled by (seed, epoch); the last incomplete batch is dropped."""
        if self.train_set is None:
            raise ValueError("call setup('fit') first")
        return self.loader(self.train_set, train=True)

    def val_dataloader(self) -> Loader:
        """All validation images, in order."""
        if self.val_set is None:
            raise ValueError("call setup('validate') first")
        return self.loader(self.val_set)

    def test_dataloader(self) -> Loader:
        """All test images, in order."""
        if self.test_set is None:
            raise ValueError("call setup('test') first")
        return self.loader(self.test_set)

    def predict_dataloader(self) -> Loader:
        """The test images: predict is looked at, never tuned on."""
        return self.test_dataloader()


class ShapesData(ImageData):
    """Procedural images with exact masks: nothing to download.

    Args:
        classes: Number of classes, 6 to 10.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        size: Height and width in pixels: 32, 64 or 96.
        shortcut: Probability that a colored patch agrees with the label; 0 draws no patch.
        shortcut_cells: Side of the patch in cells of a map of 8 x 8, 0.5 to 2.
        objects: 1, or 2 objects of different classes (the label is the first one's).
        suppressor: Strength in [0, 1] of a noise field shared by background and object.
        task: What the label is: `shape`, or with two objects `conjunction` (a disc and a triangle)
            or `xor` (one of them without the other).
        seed: Seed of the order of training.
        split_seed: Which images there are.
        batch_size: Images in a batch, all processes together.
        limit: Train on so many images only.
    """

    def __init__(
        self,
        classes: int = 8,
        train: int = 12000,
        val: int = 2000,
        test: int = 2000,
        size: int = 32,
        shortcut: float = 0.0,
        shortcut_cells: float = 1.0,
        objects: int = 1,
        suppressor: float = 0.0,
        task: Task = "shape",
        seed: int = 0,
        split_seed: int = 0,
        batch_size: int = 128,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, split_seed=split_seed, limit=limit)
        self._lengths = {"train": train, "val": val, "test": test}
        self._options = Shapes(
            split="train",
            length=train,
            size=size,
            seed=split_seed,
            classes=classes,
            shortcut=shortcut,
            shortcut_cells=shortcut_cells,
            objects=objects,
            suppressor=suppressor,
            task=task,
        )
        for split in ("val", "test"):  # a wrong number is told now, not after the training
            self.shapes(split)
        largest = max(self._lengths.values())
        check_memory(largest * 3 * size**2, f"{largest:,} images of {size}x{size} pixels")

    def shapes(self, split: Literal["train", "val", "test"]) -> Shapes:
        """What is drawn in one split."""
        return dataclasses.replace(self._options, split=split, length=self._lengths[split])

    def load_fit_sets(self) -> tuple[ImageSet, ImageSet]:
        """Loads the images to train and to validate with."""
        return shapes_set(self.shapes("train")), shapes_set(self.shapes("val"))

    def load_test_set(self) -> ImageSet:
        """Loads the images to test with."""
        return shapes_set(self.shapes("test"))


class CIFARData(ImageData):
    """CIFAR-10 or CIFAR-100 through torchvision.

    Args:
        name: `cifar10` or `cifar100`.
        root: Folder of the files.
        download: Fetch the files where they are missing.
        val_fraction: Share of the training images (or their number) that validates.
        seed: Seed of the order of training.
        split_seed: Which images validate.
        batch_size: Images in a batch, all processes together.
        limit: Train on so many images only, the same number of each class.
    """

    def __init__(
        self,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        root: Path = Path("data"),
        download: bool = True,
        val_fraction: float = 0.1,
        seed: int = 0,
        split_seed: int = 0,
        batch_size: int = 128,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, split_seed=split_seed, limit=limit)
        self.dataset: Literal["cifar10", "cifar100"] = name
        self.root = expand_home(root)
        self.download = download
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Download in one process, before the others look for the files."""
        load_cifar(self.dataset, self.root, "train", download=self.download)

    def load_fit_sets(self) -> tuple[ImageSet, ImageSet]:
        """Loads the images to train and to validate with."""
        images = load_cifar(self.dataset, self.root, "train", download=self.download)
        return carve(images, self.val_fraction, self.split_seed)

    def load_test_set(self) -> ImageSet:
        """Loads the images to test with."""
        return load_cifar(self.dataset, self.root, "test", download=self.download)


class FolderData(ImageData):
    """Any folder of images, with labels (class folders) or without.

    With train, val and test folders each is what its name says. Without a test folder the val
    folder is the test set and validation is carved from the training images, so that nothing is
    tuned on what is tested; without both, test and validation are carved. Sets are carved by seed,
    and the test set doesn't depend on `val_fraction`.

    Args:
        root: Folder with train, val and test folders, or class folders, or images.
        size: Shorter side after scaling, and side of the square cut from the middle; null for
            images that have one size already.
        labeled: True requires class folders; false ignores them; null looks.
        val_fraction: Share of the training images (or their number) that validates, where there
            is no folder for it.
        test_fraction: Share of the images (or their number) that tests, where there is no folder
            for it.
        on_broken: `raise` names a broken file; `skip` goes on without it and says how many.
        cache_dir: Folder of decoded images; null: CAMDISTILL_CACHE or ~/.cache/camdistill.
        seed: Seed of the order of training.
        split_seed: Which images validate (and test).
        batch_size: Images in a batch, all processes together.
        limit: Train on so many images only, the same number of each class.
    """

    def __init__(
        self,
        root: Path,
        size: int | None = None,
        labeled: bool | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        on_broken: OnBroken = "raise",
        cache_dir: Path | None = None,
        seed: int = 0,
        split_seed: int = 0,
        batch_size: int = 128,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, split_seed=split_seed, limit=limit)
        self.root = expand_home(root)
        self.image_size = size
        self.labeled = labeled
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.on_broken = on_broken
        self.cache_dir = cache_dir
        self._set_by_split: dict[Split, ImageSet] = {}

    @property
    def carving(self) -> Carving:
        """What decides which images test, where these are carved."""
        return Carving(self.split_seed, self.test_fraction)

    def _load_split(self, split: Split) -> ImageSet:
        # Listing 60,000 files takes most of a second start: once in prepare_data is enough.
        if split not in self._set_by_split:
            self._set_by_split[split] = load_folder(
                self.root,
                split,
                size=self.image_size,
                labeled=self.labeled,
                on_broken=self.on_broken,
                cache_dir=self.cache_dir,
            )
        return self._set_by_split[split]

    def _find_layout(self) -> Layout:
        return find_layout(self.root)

    def prepare_data(self) -> None:
        """Decode the training images in one process, before the others open the cache.

        What is wrong with any split is told here, before a training has written anything.
        """
        layout = self._find_layout()
        self._load_split("train")
        if layout.test is not None:
            classes = find_classes(layout.train, self.labeled)
            check_test_folder(layout.train, layout.test, classes)
        else:
            try:
                self.check_test_set()
            except UserError as reason:  # one may train without
                _log.warning("%s", reason)
        self.load_fit_sets()

    def load_fit_sets(self) -> tuple[ImageSet, ImageSet]:
        """Loads the images to train and to validate with."""
        layout, train = self._find_layout(), self._load_split("train")
        if layout.val is not None:
            return train, self._load_split("val")
        if layout.test is None:
            train, _ = carve(train, self.test_fraction, self.split_seed, purpose="test")
        return carve(train, self.val_fraction, self.split_seed)

    def check_test_set(self) -> None:
        """Checks that there will be images to test on."""
        if self.test_fraction == 0 and self._find_layout().test is None:
            raise UserError(
                f"no test images: {self.root} has no test folder and test_fraction is 0; give a "
                "test folder, or a test_fraction above 0"
            )

    def load_test_set(self) -> ImageSet:
        """Loads the images to test with."""
        self.check_test_set()
        if self._find_layout().test is not None:
            return self._load_split("test")
        _, test = carve(
            self._load_split("train"), self.test_fraction, self.split_seed, purpose="test"
        )
        return test
