import numpy as np

from camdistill.data.concepts import shape_concepts
from camdistill.data.shapes import Shapes


def test_classes_split_the_objects_and_distractors_the_rest() -> None:
    shapes = Shapes("test", 60, shortcut=0.5)
    indices = np.arange(60)
    masks = shape_concepts(shapes, indices)
    classes = np.stack([masks[name] for name in shapes.class_names if name in masks])
    assert np.array_equal(classes.sum(0), masks["object"])
    shapes_of_all_kinds = masks["any shape"] | masks["shortcut"]
    assert np.array_equal(shapes_of_all_kinds, ~masks["background"])
    labels = shapes.render(indices).labels
    for number, name in enumerate(shapes.class_names):
        if name in masks:
            assert set(labels[masks[name].any((1, 2))]) == {number}


def test_edges_are_the_pixels_on_both_sides_of_a_border() -> None:
    masks = shape_concepts(Shapes("test", 4), np.arange(4))
    for background, edge in zip(masks["background"], masks["edge"], strict=True):
        for row in range(32):
            for column in range(32):
                around = [
                    background[r, c]
                    for r, c in (
                        (row - 1, column),
                        (row + 1, column),
                        (row, column - 1),
                        (row, column + 1),
                    )
                    if 0 <= r < 32 and 0 <= c < 32
                ]
                assert edge[row, column] == any(x != background[row, column] for x in around)


def test_second_objects_count_for_their_class() -> None:
    shapes = Shapes("test", 40, objects=2)
    masks = shape_concepts(shapes, np.arange(40))
    found = shapes.render(np.arange(40))
    both = np.stack([masks[name] for name in shapes.class_names]).sum(0)
    assert np.array_equal(both, found.masks["object"].astype(int) + found.masks["second"])
