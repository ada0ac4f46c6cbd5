"""The groups of TensorBoard's cards, and the register of what each card means.

A tag has exactly one slash: what stands before it is the group, and the numbers put the groups in
order. TensorBoard unfolds only the first two groups, so these hold what one looks at first.
"""

import re
from collections.abc import Callable

EVALUATION = "0_evaluation"
OVERVIEW, MAPS = "1_overview", "2_maps"
PROFILE, ACTIVATIONS, FILTERS = "3_profile", "4_activations", "5_filters"
SIMILARITY, UNITS, RUN, TEST = "6_similarity", "7_units", "8_run", "9_test"

MEANINGS: dict[str, str] = {}
MEANINGS_OF_LAYERS: dict[str, str] = {}


def card(tag: str, meaning: str) -> str:
    """The tag, from now on with a meaning (Markdown)."""
    MEANINGS[tag] = meaning
    return tag


def card_of_layer(stem: str, meaning: str) -> Callable[[str], str]:
    """What makes the tag of a layer, likewise.

    `layer1.0.relu#1` keeps its dots; a regular expression's signs go.
    """
    MEANINGS_OF_LAYERS[stem] = meaning
    return lambda layer: stem + re.sub(r"[^\w.-]", "-", layer)
