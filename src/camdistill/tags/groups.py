"""The groups of TensorBoard's cards, and the register of what each card means.

A tag has exactly one slash: what stands before it is the group, and the numbers put the groups in
order. TensorBoard unfolds only the first two groups, so these hold what one looks at first.
"""

import re

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


def card_of_layer(stem: str, meaning: str) -> str:
    """What the names of layers are put behind, likewise."""
    MEANINGS_OF_LAYERS[stem] = meaning
    return stem


def of(stem: str, layer: str) -> str:
    """Tag of one layer: `layer1.0.relu#1` keeps its dots; a regular expression's signs go."""
    return stem + re.sub(r"[^\w.-]", "-", layer)
