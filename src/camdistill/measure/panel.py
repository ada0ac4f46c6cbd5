"""A batch of images, asked once for all explainers, and each explainer's values on it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from camdistill.explain.maps import relu
from camdistill.measure import (
    boxes,
    complexity,
    faithfulness,
    localization,
    masking,
    randomization,
    removal,
    robustness,
)
from camdistill.measure.learned import Context, LearnedMetric, context, load_metric
from camdistill.measure.metrics import FILE, metric_of
from camdistill.perturb.bank import Bank, Plan, bank
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import BASELINES, baseline
from camdistill.perturb.ranks import Ranks, ranks
from camdistill.types import Explain, Images, Labels, Logits, Maps, Masks, PerImage

_MORE_SHARES = {0.25: 64, 0.1: 32, 0.5: 32, 0.75: 32}  # where sensitivity-n is asked for


@dataclass(frozen=True)
class Scene:
    """Images, and all that is known of them before there is a map.

    Attributes:
        network: In eval mode; takes images in [0, 1].
        images: In [0, 1].
        classes: Whose evidence the maps show: the network's own top class.
        logits: Of the images.
        seed: Of every random choice; all explainers get the same ones.
        bank: Answers to changes that no explainer chose; None where no metric needs it.
        shown: What stands where something is removed, by kind; "rerendered" is the image drawn
            again without its objects.
        masks: The objects'; empty ones where there is none.
        learned: Metrics that were learnt, by their file.
        context: What those are told of the images; None without any.
    """

    network: nn.Module
    images: Images
    classes: Labels
    logits: Logits
    seed: str
    bank: Bank | None = None
    shown: dict[str, Images] = field(default_factory=dict)
    masks: Masks | None = None
    learned: dict[str, LearnedMetric] = field(default_factory=dict)
    context: Context | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """A stream of its own for each purpose."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Measured:
    """One explainer's values on a scene.

    Attributes:
        values: By metric; NaN where there is nothing to say.
        curves: Probabilities of insertion and deletion by metric, at `removal.LEVELS`;
            NaN for a failure.
    """

    values: dict[str, PerImage]
    curves: dict[str, Float[Tensor, "batch levels"]]


@dataclass(frozen=True)
class _Shot:
    scene: Scene
    maps: Maps
    order: Ranks
    explain: Explain | None
    curves: dict[str, Float[Tensor, "batch levels"]]


def scene(
    network: nn.Module,
    images: Images,
    metrics: Sequence[str],
    seed: str,
    *,
    masks: Masks | None = None,
    rerendered: Images | None = None,
    fill: Literal["blur", "mean", "grey", "black"] = "grey",
) -> Scene:
    """Asks the network what every explainer needs to know: once.

    Args:
        network: In eval mode.
        images: In [0, 1].
        metrics: Those that will be measured.
        seed: Of every random choice on these images.
        masks: The objects', where known.
        rerendered: The images without their objects, where the data can draw them.
        fill: What stands where the bank removes something.
    """
    families = {metric_of(name).family for name in metrics}
    logits = logits_of(network, images)
    shown: dict[str, Images] = {
        kind: baseline(images, kind)
        for kind in BASELINES
        if {f"insertion_{kind}", f"deletion_{kind}"} & families
    }
    if rerendered is not None:
        shown["rerendered"] = rerendered
    classes = logits.argmax(1)
    whole = Scene(network, images, classes, logits, seed, shown=shown, masks=masks)
    if learned := [family for family in families if family.endswith(FILE)]:
        by_file = {name: load_metric(name).to(images.device) for name in sorted(learned)}
        whole = replace(whole, learned=by_file, context=context(network, images, classes))
    if "bank" not in families:
        return whole
    plan = Plan(subsets=_MORE_SHARES) if "sensitivity_n" in metrics else Plan()
    asked = bank(
        network,
        images,
        baseline(images, fill),
        whole.generator("bank"),
        classes=whole.classes,
        plan=plan,
    )
    return replace(whole, bank=asked)


def measure(
    scene: Scene, maps: Maps, metrics: Sequence[str], explain: Explain | None = None
) -> Measured:
    """One explainer's values.

    Args:
        scene: Of the same images.
        maps: Raw, at the images' resolution, of the scene's classes. A map with NaN in it is a
            failure: NaN by every metric.
        metrics: Names; one whose ground truth or explainer is missing is left out.
        explain: What made the maps; None where they are stored, and the gates can't be asked.
    """
    sound = torch.isfinite(maps).flatten(1).all(1)
    usable = torch.where(sound[:, None, None], maps, 0)
    broken = torch.zeros_like(sound)
    live = None if explain is None else _watched(explain, broken)
    shot = _Shot(scene, usable, ranks(usable, scene.generator("ties")), live, {})
    values: dict[str, PerImage] = {}
    for family in dict.fromkeys(metric_of(name).family for name in metrics):
        if _possible(family, shot):
            broken.zero_()
            computed = _computed(family, shot)
            values |= {n: torch.where(broken, torch.nan, one) for n, one in computed.items()}
    kept = {
        name: torch.where(sound, values[name].float(), torch.nan)
        for name in metrics
        if name in values
    }
    known = sound[:, None]
    curves = {name: torch.where(known, one, torch.nan) for name, one in shot.curves.items()}
    return Measured(kept, curves)


def _watched(explain: Explain, broken: Bool[Tensor, "batch"]) -> Explain:
    """An explainer whose broken maps are noted, in place, where a metric asks for more maps."""

    def watched(network: nn.Module, images: Images, classes: Labels) -> Maps:
        maps = explain(network, images, classes)
        sound = torch.isfinite(maps).flatten(1).all(1)
        broken.logical_or_(~sound)
        return torch.where(sound[:, None, None], maps, 0)

    return watched


def _possible(family: str, shot: _Shot) -> bool:
    if family in ("adcc", *_GATES):
        return shot.explain is not None
    if family == "localisation":
        return shot.scene.masks is not None
    return family != "deletion_rerendered" or "rerendered" in shot.scene.shown


def _computed(family: str, shot: _Shot) -> dict[str, PerImage]:
    if family in shot.scene.learned:
        return {family: _learned(family, shot)}
    if family in _GATES:
        return {family: _GATES[family](shot)}
    if family.startswith(("insertion_", "deletion_")):
        return {family: _removal(family, shot)}
    return _FAMILIES[family](shot)


def _of_bank(shot: _Shot) -> dict[str, PerImage]:
    asked = shot.scene.bank
    assert asked is not None, "the scene was made for these metrics"
    return {
        "faithfulness_correlation": faithfulness.faithfulness_correlation(shot.maps, asked),
        "sensitivity_n": faithfulness.sensitivity_n(shot.maps, asked),
        "infidelity": faithfulness.infidelity(shot.maps, asked),
        "occlusion_1": faithfulness.occlusion_correlation(shot.maps, asked, 1),
        "occlusion_2": faithfulness.occlusion_correlation(shot.maps, asked, 2),
    }


def _removal(name: str, shot: _Shot) -> PerImage:
    way, _, kind = name.partition("_")
    ask = removal.insertion if way == "insertion" else removal.deletion
    given = shot.scene
    curve = ask(given.network, given.images, given.classes, shot.order, given.shown[kind])
    shot.curves[name] = curve.probabilities
    return curve.area()


def _road(shot: _Shot) -> dict[str, PerImage]:
    given = shot.scene
    found = removal.road(
        given.network, given.images, given.classes, shot.order, given.generator("road")
    )
    return {
        "road": found.combined(),
        "road_morf": found.morf.mean(),
        "road_lerf": found.lerf.mean(),
    }


def _masking(shot: _Shot) -> dict[str, PerImage]:
    given = shot.scene
    return masking.masked(given.network, given.images, given.classes, shot.maps)._asdict()


def _adcc(shot: _Shot) -> dict[str, PerImage]:
    given = shot.scene
    assert shot.explain is not None, "asked before"
    found = masking.adcc(given.network, given.images, given.classes, shot.maps, shot.explain)
    return {"adcc": found}


def _complexity(shot: _Shot) -> dict[str, PerImage]:
    evidence = relu(shot.maps)
    return {
        "gini": complexity.gini(evidence),
        "entropy": complexity.entropy(evidence),
        "mean_size": complexity.mean_size(evidence),
    }


def _learned(name: str, shot: _Shot) -> PerImage:
    known = shot.scene.context
    assert known is not None, "the scene was made for this metric"
    with torch.no_grad():
        return shot.scene.learned[name](shot.maps, known)  # type: ignore[no-any-return]


def _localisation(shot: _Shot) -> dict[str, PerImage]:
    masks = shot.scene.masks
    assert masks is not None, "asked before"
    pixels = shot.maps.shape[1]
    near = 2 * pixels / 32  # TorchRay's 15 pixels of 224, at this size
    return {
        "rank_accuracy": localization.relevance_rank_accuracy(shot.order, masks),
        "energy_share": localization.energy_pointing_game(shot.maps, masks),
        "energy_lift": localization.energy_lift(shot.maps, masks),
        "pointing_game": localization.pointing_game(shot.order, masks, near),
        "iou": localization.iou(shot.maps, masks),
        "average_precision": localization.average_precision(shot.maps, masks),
        "box_error": boxes.localisation_error(shot.maps, boxes.box_around(masks)),
    }


def _robust(metric: Callable[..., PerImage], shot: _Shot) -> PerImage:
    given = shot.scene
    nearby = given.generator("nearby")
    return metric(shot.explain, given.network, given.images, given.classes, nearby)


def _random_logit(shot: _Shot) -> PerImage:
    given, explain = shot.scene, shot.explain
    assert explain is not None, "asked before"
    other = given.generator("other class")
    return randomization.random_logit(
        explain, given.network, given.images, given.classes, given.logits, other
    )


def _randomisation(shot: _Shot) -> PerImage:
    given, explain = shot.scene, shot.explain
    assert explain is not None, "asked before"
    return randomization.efficient_randomisation(
        explain, given.network, given.images, given.classes, given.generator("weights")
    )


def _smooth_randomisation(shot: _Shot) -> PerImage:
    given, explain = shot.scene, shot.explain
    assert explain is not None, "asked before"
    found = randomization.smooth_randomisation(
        explain, given.network, given.images, given.classes, given.generator("weights")
    )
    return torch.stack(list(found.values())).mean(0)


_GATES: dict[str, Callable[[_Shot], PerImage]] = {
    "max_sensitivity": partial(_robust, robustness.max_sensitivity),
    "local_lipschitz": partial(_robust, robustness.local_lipschitz),
    "random_logit": _random_logit,
    "randomisation": _randomisation,
    "smooth_randomisation": _smooth_randomisation,
}
_FAMILIES: dict[str, Callable[[_Shot], dict[str, PerImage]]] = {
    "bank": _of_bank,
    "road": _road,
    "masking": _masking,
    "adcc": _adcc,
    "complexity": _complexity,
    "localisation": _localisation,
}
