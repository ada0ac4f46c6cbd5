"""The metrics by name, with the use of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from camdistill.errors import UserError, nearest
from camdistill.measure.learned import load_metric
from camdistill.perturb.imputers import BASELINES

Use = Literal["rank", "reference", "mask", "paper", "axis", "gate", "learned"]
"""What a metric is for: ranking explainers; being the truth that metrics are held against; ground
truth of the image, not of the network; a paper's row, not to be trusted; an axis beside
faithfulness; a gate that an explainer passes or not; a file that `camdistill learn` wrote."""


@dataclass(frozen=True)
class Metric:
    """Properties of a metric that are known before it is measured.

    Attributes:
        higher: Whether a higher value is better.
        use: What the metric is used for.
        family: Metrics of the same family are computed together.
    """

    higher: bool
    use: Use
    family: str


METRICS: dict[str, Metric] = {
    "faithfulness_correlation": Metric(True, "rank", "bank"),
    "sensitivity_n": Metric(True, "rank", "bank"),
    "infidelity": Metric(False, "rank", "bank"),
    "occlusion_1": Metric(True, "paper", "bank"),
    "occlusion_2": Metric(True, "paper", "bank"),
    "insertion_blur": Metric(True, "rank", "insertion_blur"),
    **{f"insertion_{kind}": Metric(True, "paper", f"insertion_{kind}") for kind in BASELINES[1:]},
    **{f"deletion_{kind}": Metric(False, "paper", f"deletion_{kind}") for kind in BASELINES},
    "road": Metric(True, "rank", "road"),
    "road_morf": Metric(False, "rank", "road"),
    "road_lerf": Metric(True, "rank", "road"),
    "average_drop": Metric(False, "paper", "masking"),
    "increase": Metric(True, "paper", "masking"),
    "average_gain": Metric(True, "paper", "masking"),
    "drop_in_deletion": Metric(True, "paper", "masking"),
    "adcc": Metric(True, "paper", "adcc"),
    "gini": Metric(True, "axis", "complexity"),
    "entropy": Metric(False, "axis", "complexity"),
    "mean_size": Metric(False, "axis", "complexity"),
    "max_sensitivity": Metric(False, "gate", "max_sensitivity"),
    "local_lipschitz": Metric(False, "gate", "local_lipschitz"),
    "random_logit": Metric(False, "gate", "random_logit"),
    "randomization": Metric(True, "gate", "randomization"),
    "smooth_randomization": Metric(False, "gate", "smooth_randomization"),
    "deletion_rerendered": Metric(False, "reference", "deletion_rerendered"),
    "rank_accuracy": Metric(True, "mask", "localization"),
    "energy_share": Metric(True, "mask", "localization"),
    "energy_lift": Metric(True, "mask", "localization"),
    "pointing_game": Metric(True, "mask", "localization"),
    "iou": Metric(True, "mask", "localization"),
    "average_precision": Metric(True, "mask", "localization"),
    "box_error": Metric(False, "mask", "localization"),
}
FILE = ".safetensors"
# Values of these metrics for maps that another network makes, whatever that network learned.
OF_WEIGHTS = {"randomization": 0, "smooth_randomization": 1}
DEFAULT = (
    "faithfulness_correlation",
    "infidelity",
    "insertion_blur",
    "deletion_gray",
    "road",
    "road_lerf",
    "road_morf",
    "gini",
    "max_sensitivity",
    "random_logit",
    "randomization",
)
DEFAULT_WITH_MASKS = (
    "rank_accuracy",
    "energy_lift",
    "pointing_game",
    "iou",
    "average_precision",
    "box_error",
)


def check_metrics(names: Sequence[str]) -> None:
    """Checks that all names are metrics, before anything runs.

    Raises:
        UserError: If a name is no metric, or a file can't be read as a learned metric.
    """
    for name in names:
        if name.endswith(FILE):
            load_metric(name)
        elif name not in METRICS:
            raise UserError(f"no metric '{name}'; {nearest(name, METRICS)}; or give FILE{FILE}")


def metric_of(name: str) -> Metric:
    """Returns the properties of a metric; a learned metric has its file as its name."""
    return Metric(True, "learned", name) if name.endswith(FILE) else METRICS[name]
