"""What is in procedural images, as masks by name: concepts that a unit may respond to."""

import numpy as np
from jaxtyping import Bool, Int64

from camdistill.data.shapes import Shapes
from camdistill.data.shapes_drawing import DISTRACTORS

Masks = dict[str, Bool[np.ndarray, "n size size"]]


def shape_concepts(shapes: Shapes, indices: Int64[np.ndarray, "n"]) -> Masks:
    """Masks of some images by concept.

    Each class and each distractor by its name, and `object`, `any shape`, `edge` (a pixel whose
    neighbour belongs to something else), `background` and, where there is one, `shortcut`.

    Args:
        shapes: Any split.
        indices: Of its images.
    """
    found = shapes.render(indices)
    masks = found.masks
    concepts: Masks = {
        "object": masks["object"],
        "any shape": masks["object"] | masks["distractor"],
        "edge": _edges(masks["background"]),
        "background": masks["background"],
    }
    if shapes.shortcut > 0:
        concepts["shortcut"] = masks["shortcut"]
    for number, name in enumerate(shapes.shape_names):
        own = masks["object"] & (found.kinds == number)[:, None, None]
        if found.second_labels is not None:
            own |= masks["second"] & (found.second_labels == number)[:, None, None]
        concepts[name] = own
    for number, name in enumerate(DISTRACTORS):
        concepts[name] = masks["distractor"] & (found.distractors == number)[:, None, None]
    return {name: mask for name, mask in concepts.items() if mask.any()}


def _edges(background: Bool[np.ndarray, "n size size"]) -> Bool[np.ndarray, "n size size"]:
    """Pixels with a neighbour, above, below or beside, on the other side of a border."""
    edges = np.zeros_like(background)
    down = background[:, 1:] != background[:, :-1]
    across = background[:, :, 1:] != background[:, :, :-1]
    edges[:, 1:] |= down
    edges[:, :-1] |= down
    edges[:, :, 1:] |= across
    edges[:, :, :-1] |= across
    return edges
