"""Prepares a batch of images once for all explainers, and measures each explainer on it."""

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
from camdistill.measure.learned import Context, LearnedMetric, image_context, load_metric
from camdistill.measure.metrics import FILE, metric_of
from camdistill.perturb.bank import Bank, BankPlan, build_bank
from camdistill.perturb.batched_forward import logits_of
from camdistill.perturb.imputers import BASELINES, baseline
from camdistill.perturb.ranks import Ranks, ranks
from camdistill.types import Explain, Images, Labels, Logits, Maps, Masks, PerImage

_MORE_SHARES = {0.25: 64, 0.1: 32, 0.5: 32, 0.75: 32}  # if sensitivity-n is measured


@dataclass(frozen=True)
class EvaluationBatch:
    """Images, and everything about them that doesn't depend on a map.

    Attributes:
        network: In eval mode; takes images in [0, 1].
        images: In [0, 1].
        classes: The class that the maps explain: the network's top class of each image.
        logits: Logits of the images.
        seed: Seed of every random choice; all explainers get the same choices.
        bank: Scores on changes that no explainer chose; None where no metric needs it.
        replacements: Pictures that replace what is removed, by kind. "rerendered" is the image
            drawn again without its objects.
        masks: Masks of the objects; an empty mask where there is no object.
        learned: Learned metrics by their file.
        context: The learned metrics' planes of the images; None without such metrics.
    """

    network: nn.Module
    images: Images
    classes: Labels
    logits: Logits
    seed: str
    bank: Bank | None = None
    replacements: dict[str, Images] = field(default_factory=dict)
    masks: Masks | None = None
    learned: dict[str, LearnedMetric] = field(default_factory=dict)
    context: Context | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """Returns a random generator that is independent for each purpose."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class MetricValues:
    """One explainer's values on a batch.

    Attributes:
        values: Values by metric; NaN where an image has no value.
        curves: Probabilities of insertion and deletion by metric, at `removal.LEVELS`; NaN for a
            failure.
    """

    values: dict[str, PerImage]
    curves: dict[str, Float[Tensor, "batch levels"]]


@dataclass(frozen=True)
class _MetricInputs:
    batch: EvaluationBatch
    maps: Maps
    order: Ranks
    explain: Explain | None
    curves: dict[str, Float[Tensor, "batch levels"]]


def prepare_batch(
    network: nn.Module,
    images: Images,
    metrics: Sequence[str],
    seed: str,
    *,
    masks: Masks | None = None,
    rerendered: Images | None = None,
    fill: Literal["blur", "mean", "gray", "black"] = "gray",
) -> EvaluationBatch:
    """Evaluates the network once for everything that all explainers need.

    Args:
        network: In eval mode.
        images: In [0, 1].
        metrics: Names of the metrics that will be measured.
        seed: Seed of every random choice on these images.
        masks: Masks of the objects, where known.
        rerendered: The images without their objects, where the data can draw them.
        fill: What replaces the pixels that the bank removes.
    """
    families = {metric_of(name).family for name in metrics}
    logits = logits_of(network, images)
    replacements: dict[str, Images] = {
        kind: baseline(images, kind)
        for kind in BASELINES
        if {f"insertion_{kind}", f"deletion_{kind}"} & families
    }
    if rerendered is not None:
        replacements["rerendered"] = rerendered
    classes = logits.argmax(1)
    batch = EvaluationBatch(
        network, images, classes, logits, seed, replacements=replacements, masks=masks
    )
    if learned := [family for family in families if family.endswith(FILE)]:
        by_file = {name: load_metric(name).to(images.device) for name in sorted(learned)}
        batch = replace(batch, learned=by_file, context=image_context(network, images, classes))
    if "bank" not in families:
        return batch
    plan = BankPlan(subsets=_MORE_SHARES) if "sensitivity_n" in metrics else BankPlan()
    perturbation_bank = build_bank(
        network,
        images,
        baseline(images, fill),
        batch.generator("bank"),
        classes=batch.classes,
        plan=plan,
    )
    return replace(batch, bank=perturbation_bank)


def measure(
    batch: EvaluationBatch, maps: Maps, metrics: Sequence[str], explain: Explain | None = None
) -> MetricValues:
    """Measures one explainer on a batch.

    Args:
        batch: The batch of the same images.
        maps: Raw maps of the batch's classes, at the images' resolution. A map with NaN in it is a
            failure: its value is NaN in every metric.
        metrics: Names of the metrics. One whose ground truth or explainer is missing is left out.
        explain: The explainer of the maps. None for stored maps, which can't be tested by the
            gates.
    """
    sound = torch.isfinite(maps).flatten(1).all(1)
    usable = torch.where(sound[:, None, None], maps, 0)
    broken = torch.zeros_like(sound)
    noting_explain = None if explain is None else _note_broken_maps(explain, broken)
    inputs = _MetricInputs(
        batch, usable, ranks(usable, batch.generator("ties")), noting_explain, {}
    )
    values: dict[str, PerImage] = {}
    for family in dict.fromkeys(metric_of(name).family for name in metrics):
        if _can_measure(family, inputs):
            broken.zero_()
            family_values = _measure_family(family, inputs)
            values |= {
                n: torch.where(broken, torch.nan, per_image)
                for n, per_image in family_values.items()
            }
    requested_values = {
        name: torch.where(sound, values[name].float(), torch.nan)
        for name in metrics
        if name in values
    }
    has_map = sound[:, None]
    curves = {
        name: torch.where(has_map, per_image, torch.nan)
        for name, per_image in inputs.curves.items()
    }
    return MetricValues(requested_values, curves)


def _note_broken_maps(explain: Explain, broken: Bool[Tensor, "batch"]) -> Explain:
    """An explainer that marks its broken maps in `broken`, in place, and sets them to 0."""

    def explain_and_note(network: nn.Module, images: Images, classes: Labels) -> Maps:
        maps = explain(network, images, classes)
        sound = torch.isfinite(maps).flatten(1).all(1)
        broken.logical_or_(~sound)
        return torch.where(sound[:, None, None], maps, 0)

    return explain_and_note


def _can_measure(family: str, inputs: _MetricInputs) -> bool:
    if family in ("adcc", *_GATES):
        return inputs.explain is not None
    if family == "localization":
        return inputs.batch.masks is not None
    return family != "deletion_rerendered" or "rerendered" in inputs.batch.replacements


def _measure_family(family: str, inputs: _MetricInputs) -> dict[str, PerImage]:
    if family in inputs.batch.learned:
        return {family: _score_learned(family, inputs)}
    if family in _GATES:
        return {family: _GATES[family](inputs)}
    if family.startswith(("insertion_", "deletion_")):
        return {family: _removal(family, inputs)}
    return _FAMILIES[family](inputs)


def _bank_metrics(inputs: _MetricInputs) -> dict[str, PerImage]:
    bank = inputs.batch.bank
    assert bank is not None, "the scene was made for these metrics"
    return {
        "faithfulness_correlation": faithfulness.faithfulness_correlation(inputs.maps, bank),
        "sensitivity_n": faithfulness.sensitivity_n(inputs.maps, bank),
        "infidelity": faithfulness.infidelity(inputs.maps, bank),
        "occlusion_1": faithfulness.occlusion_correlation(inputs.maps, bank, 1),
        "occlusion_2": faithfulness.occlusion_correlation(inputs.maps, bank, 2),
    }


def _removal(name: str, inputs: _MetricInputs) -> PerImage:
    direction, _, kind = name.partition("_")
    trace_curve = removal.insertion if direction == "insertion" else removal.deletion
    batch = inputs.batch
    curve = trace_curve(
        batch.network, batch.images, batch.classes, inputs.order, batch.replacements[kind]
    )
    inputs.curves[name] = curve.probabilities
    return curve.area()


def _road(inputs: _MetricInputs) -> dict[str, PerImage]:
    batch = inputs.batch
    curves = removal.road(
        batch.network, batch.images, batch.classes, inputs.order, batch.generator("road")
    )
    return {
        "road": curves.combine(),
        "road_morf": curves.morf.mean(),
        "road_lerf": curves.lerf.mean(),
    }


def _masking(inputs: _MetricInputs) -> dict[str, PerImage]:
    batch = inputs.batch
    return masking.masking_scores(batch.network, batch.images, batch.classes, inputs.maps)._asdict()


def _adcc(inputs: _MetricInputs) -> dict[str, PerImage]:
    batch = inputs.batch
    assert inputs.explain is not None, "asked before"
    scores = masking.adcc(batch.network, batch.images, batch.classes, inputs.maps, inputs.explain)
    return {"adcc": scores}


def _complexity(inputs: _MetricInputs) -> dict[str, PerImage]:
    evidence = relu(inputs.maps)
    return {
        "gini": complexity.gini(evidence),
        "entropy": complexity.entropy(evidence),
        "mean_size": complexity.mean_size(evidence),
    }


def _score_learned(name: str, inputs: _MetricInputs) -> PerImage:
    context = inputs.batch.context
    assert context is not None, "the scene was made for this metric"
    with torch.no_grad():
        return inputs.batch.learned[name](inputs.maps, context)  # type: ignore[no-any-return]


def _localization(inputs: _MetricInputs) -> dict[str, PerImage]:
    masks = inputs.batch.masks
    assert masks is not None, "asked before"
    pixels = inputs.maps.shape[1]
    near = 2 * pixels / 32  # TorchRay's 15 pixels of 224, at this size
    return {
        "rank_accuracy": localization.relevance_rank_accuracy(inputs.order, masks),
        "energy_share": localization.energy_pointing_game(inputs.maps, masks),
        "energy_lift": localization.energy_lift(inputs.maps, masks),
        "pointing_game": localization.pointing_game(inputs.order, masks, near),
        "iou": localization.iou(inputs.maps, masks),
        "average_precision": localization.average_precision(inputs.maps, masks),
        "box_error": boxes.localization_error(inputs.maps, boxes.box_around(masks)),
    }


def _robust(metric: Callable[..., PerImage], inputs: _MetricInputs) -> PerImage:
    batch = inputs.batch
    nearby = batch.generator("nearby")
    return metric(inputs.explain, batch.network, batch.images, batch.classes, nearby)


def _random_logit(inputs: _MetricInputs) -> PerImage:
    batch, explain = inputs.batch, inputs.explain
    assert explain is not None, "asked before"
    other = batch.generator("other class")
    return randomization.random_logit(
        explain, batch.network, batch.images, batch.classes, batch.logits, other
    )


def _randomization(inputs: _MetricInputs) -> PerImage:
    batch, explain = inputs.batch, inputs.explain
    assert explain is not None, "asked before"
    return randomization.efficient_randomization(
        explain, batch.network, batch.images, batch.classes, batch.generator("weights")
    )


def _smooth_randomization(inputs: _MetricInputs) -> PerImage:
    batch, explain = inputs.batch, inputs.explain
    assert explain is not None, "asked before"
    correlations_by_layer = randomization.smooth_randomization(
        explain, batch.network, batch.images, batch.classes, batch.generator("weights")
    )
    return torch.stack(list(correlations_by_layer.values())).mean(0)


_GATES: dict[str, Callable[[_MetricInputs], PerImage]] = {
    "max_sensitivity": partial(_robust, robustness.max_sensitivity),
    "local_lipschitz": partial(_robust, robustness.local_lipschitz),
    "random_logit": _random_logit,
    "randomization": _randomization,
    "smooth_randomization": _smooth_randomization,
}
_FAMILIES: dict[str, Callable[[_MetricInputs], dict[str, PerImage]]] = {
    "bank": _bank_metrics,
    "road": _road,
    "masking": _masking,
    "adcc": _adcc,
    "complexity": _complexity,
    "localization": _localization,
}
