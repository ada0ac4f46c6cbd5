"""The claims in the paper's order; worlds of their own, and what the shipped networks answer."""

from camdistill.claims import (
    ablations,
    bias,
    captions,
    counterfactuals,
    depth,
    discrimination,
    exactness,
    failures,
    faithfulness_rows,
    heads,
    localization,
    photographs,
    trust,
    unit_names,
    vqa,
)
from camdistill.claims.claim import ClaimExperiment
from camdistill.errors import UserError, nearest

ROWS: tuple[tuple[str, ClaimExperiment], ...] = (
    ("1", exactness.run_cam_equality),
    ("2", heads.run_any_head),
    ("3", localization.run_boxes_fully_connected),
    ("4", localization.run_boxes_student),
    ("5", localization.run_boxes_teacher),
    ("5b", localization.run_boxes_own_threshold),
    ("5c", photographs.run_photograph_boxes),
    ("6", heads.run_pooling_cost),
    ("7", localization.run_segmentation_seeds),
    ("8", localization.run_pointing),
    ("9", discrimination.run_discrimination),
    ("10", trust.run_trust),
    ("11", faithfulness_rows.run_faithfulness),
    ("12", faithfulness_rows.run_cost),
    ("13", counterfactuals.run_counterfactuals),
    ("14", failures.run_failure_modes),
    ("15", failures.run_adversarial),
    ("16", bias.run_bias_removal),
    ("17", unit_names.run_unit_naming),
    ("18", captions.run_captioning),
    ("20", vqa.run_vqa),
    ("22", depth.run_depth),
    ("23", ablations.run_relu_ablation),
    ("24", ablations.run_pooling_ablation),
    ("25", ablations.run_backward_rules),
    ("26", faithfulness_rows.run_resolution),
)
"""Number and experiment."""
PHOTOGRAPHS = "5c"
"""The row that needs an image folder with boxes."""


def select_claims(
    numbers: list[str], *, photographs: bool = True
) -> tuple[tuple[str, ClaimExperiment], ...]:
    """The rows of some numbers, in the paper's order.

    Args:
        numbers: All where none is given.
        photographs: Whether there is an image folder with boxes: without, all are all the others.

    Raises:
        UserError: There is no row of that number.
    """
    known = [number for number, _ in ROWS]
    for number in numbers:
        if number not in known:
            raise UserError(
                f"no row '{number}'; {nearest(number, known)}; --rows takes any of "
                f"{', '.join(known)}"
            )
    selected = numbers or [number for number in known if photographs or number != PHOTOGRAPHS]
    return tuple((number, experiment) for number, experiment in ROWS if number in selected)
