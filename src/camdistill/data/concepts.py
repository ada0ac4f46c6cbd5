"""What is in procedural images, as masks by name: concepts that a unit may respond to."""

import numpy as np
from jaxtyping import Bool, Int64

from camdistill.data.shapes import Shapes
from camdistill.data.shapes_drawing import DISTRACTORS

ConceptMasks = dict[str, Bool[np.ndarray, "n size size"]]


def shape_concepts(shapes: Shapes, indices: Int64[np.ndarray, "n"]) -> ConceptMasks:
    """Masks of some images by concept.

    Each class and each distractor by its name, and `object`, `any shape`, `edge` (a pixel whose
    neighbor belongs to something else), `background` and, where there is one, `shortcut`.

    Args:
        shapes: Any split.
        indices: Indices of its images.
    """
    rendered = shapes.render(indices)
    masks = rendered.masks
    concepts: ConceptMasks = {
        "object": masks["object"],
        "any shape": masks["object"] | masks["distractor"],
        "edge": _edge_mask(masks["background"]),
        "background": masks["background"],
    }
    if shapes.shortcut > 0:
        concepts["shortcut"] = masks["shortcut"]
    for number, name in enumerate(shapes.shape_names):
        class_mask = masks["object"] & (rendered.kinds == number)[:, None, None]
        if rendered.second_labels is not None:
            class_mask |= masks["second"] & (rendered.second_labels == number)[:, None, None]
        concepts[name] = class_mask
    for number, name in enumerate(DISTRACTORS):
        concepts[name] = masks["distractor"] & (rendered.distractors == number)[:, None, None]
    return {name: mask for name, mask in concepts.items() if mask.any()}


def _edge_mask(background: Bool[np.ndarray, "n size size"]) -> Bool[np.ndarray, "n size size"]:
    """Pixels with a neighbor, above, below or beside, on the other side of a border."""
    edges = np.zeros_like(background)
    down = background[:, 1:] != background[:, :-1]
    across = background[:, :, 1:] != background[:, :, :-1]
    edges[:, 1:] |= down
    edges[:, :-1] |= down
    edges[:, :, 1:] |= across
    edges[:, :, :-1] |= across
    return edges
