"""What a file of weights says of the training: the network, its classes and its images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from camdistill.errors import UserError
from camdistill.networks.class_paths import Argument
from camdistill.networks.weights import PARTS, WeightFile

Triple = tuple[float, float, float]
EXPERIMENT = "camdistill"  # the metadata's key
LAYOUT = "0.2"  # version of the project in which an experiment's keys got their names of today
FIRST_LAYOUT = "0.1"  # it did not say its version


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of how weights were trained; whatever isn't known is None or empty.

    Attributes:
        name: The network's, as `NetworkSpec` has it.
        args: Arguments of the network's class.
        classes: Number of logits.
        class_names: Names of the classes.
        size: Height and width of the training images in pixels.
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.
        carving: Which images of a folder were left out for the test: split_seed, test_fraction.
    """

    name: str = ""
    args: Mapping[str, Argument] = field(default_factory=dict)
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    carving: Mapping[str, float] = field(default_factory=dict)


def dump_experiment(experiment: Mapping[str, object]) -> str:
    """Writes an experiment as the text that a checkpoint keeps, with the version of its layout."""
    return json.dumps({"layout": LAYOUT, **experiment})


def parse_experiment(text: str, file: str) -> dict[str, Any]:
    """Reads an experiment from the text that a checkpoint keeps.

    Args:
        text: What `dump_experiment` wrote.
        file: The checkpoint, for the message.

    Raises:
        UserError: If another version of camdistill wrote it.
        ValueError: If it is no JSON object.
    """
    experiment = json.loads(text)
    if not isinstance(experiment, dict):
        raise ValueError("no experiment in it")
    if (layout := experiment.pop("layout", FIRST_LAYOUT)) != LAYOUT:
        raise UserError(
            f"{file} was written by camdistill {layout}, this one reads {LAYOUT}; train again, or "
            "take the file from the project's checkpoints/ if it is one of these"
        )
    return experiment


def training_facts(weights: WeightFile) -> TrainingFacts:
    """Reads what a file of ours says, and the `mean` and `std` of any file that has them.

    Raises:
        UserError: If what it says can't be read.
    """
    moments = {key: weights.metadata[key] for key in ("mean", "std") if key in weights.metadata}
    try:
        mean, std = _parse_moments({key: json.loads(text) for key, text in moments.items()})
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"the metadata of '{weights.path}' has a mean or std that is not three numbers; "
            "write the file again"
        ) from error
    text = weights.metadata.get(EXPERIMENT)
    if text is None:
        return TrainingFacts(mean=mean, std=std)
    try:
        facts = _parse_experiment(parse_experiment(text, f"'{weights.path}'"))
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"the experiment in '{weights.path}' can't be read ({type(error).__name__}: {error}); "
            "copy the file again"
        ) from error
    if facts.mean is None or facts.std is None:
        return replace(facts, mean=mean, std=std)
    return facts


def _parse_experiment(settings: Mapping[str, Any]) -> TrainingFacts:
    network: Mapping[str, Any] = next((settings[part] for part in PARTS if part in settings), {})
    mean, std = _parse_moments(settings)
    if mean is None or std is None:
        mean, std = _parse_moments(network)
    size, classes = settings.get("size") or (0, 0), settings.get("classes")
    height, width = (int(side) for side in size)
    carving = settings.get("carving") or {}
    return TrainingFacts(
        name=str(network.get("name", "")),
        args=dict(network.get("args") or {}),
        classes=None if classes is None else int(classes),
        class_names=tuple(str(name) for name in settings.get("class_names") or ()),
        size=(height, width) if height and width else None,
        mean=mean,
        std=std,
        carving={str(name): float(value) for name, value in carving.items()},
    )


def _parse_moments(settings: Mapping[str, Any]) -> tuple[Triple | None, Triple | None]:
    if not {"mean", "std"} <= set(settings):
        return None, None
    mean, std = ([float(value) for value in settings[key]] for key in ("mean", "std"))
    return _parse_triple(mean), _parse_triple(std)


def _parse_triple(values: list[float]) -> Triple:
    red, green, blue = values
    return red, green, blue
