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
from camdistill.claims.claim import Claim
from camdistill.errors import UserError, nearest

ROWS: tuple[tuple[str, Claim], ...] = (
    ("1", exactness.generalises_cam),
    ("2", heads.any_head),
    ("3", localization.boxes_flattened),
    ("4", localization.boxes_student),
    ("5", localization.boxes_teacher),
    ("5b", localization.boxes_own_threshold),
    ("5c", photographs.boxes_in_photographs),
    ("6", heads.no_cost),
    ("7", localization.seeds_for_segmentation),
    ("8", localization.pointing_with_rejection),
    ("9", discrimination.discriminates),
    ("10", trust.trust),
    ("11", faithfulness_rows.faithful),
    ("12", faithfulness_rows.cheap),
    ("13", counterfactuals.counterfactuals),
    ("14", failures.failure_modes),
    ("15", failures.adversarial),
    ("16", bias.bias_found_and_removed),
    ("17", unit_names.textual),
    ("18", captions.captions),
    ("20", vqa.answers),
    ("22", depth.worse_earlier),
    ("23", ablations.without_relu),
    ("24", ablations.pooling),
    ("25", ablations.backward_rules),
    ("26", faithfulness_rows.finer),
)
"""Number and experiment."""
PHOTOGRAPHS = "5c"
"""The row that needs an image folder with boxes."""


def chosen(numbers: list[str], *, photographs: bool = True) -> tuple[tuple[str, Claim], ...]:
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
    wanted = numbers or [number for number in known if photographs or number != PHOTOGRAPHS]
    return tuple((number, claim) for number, claim in ROWS if number in wanted)
