"""TensorBoard's tags and what each card means, in one place.

A tag has exactly one slash: what stands before it is the group, and the numbers put the groups in
order. TensorBoard unfolds only the first two groups, so these hold what one looks at first. Tags of
one layer are made by functions; every other tag is a constant.
"""

import re

OVERVIEW, MAPS = "1_overview", "2_maps"
PROFILE, ACTIVATIONS, FILTERS = "3_profile", "4_activations", "5_filters"
SIMILARITY, UNITS, RUN, TEST = "6_similarity", "7_units", "8_run", "9_test"

_DESCRIPTIONS: dict[str, str] = {}
_OF_LAYERS: dict[str, str] = {}


def _tag(tag: str, description: str) -> str:
    _DESCRIPTIONS[tag] = description
    return tag


def _stem(stem: str, description: str) -> str:
    _OF_LAYERS[stem] = description
    return stem


LOSS_TRAIN = _tag(
    f"{OVERVIEW}/loss_train",
    "What is minimised, on training images: `ce` x cross-entropy + `kd` x distillation + `beta` x"
    " distance of the maps (a teacher's own training has the first term only). Smaller is better;"
    " compare only runs that have the same weights.",
)
LOSS_VAL = _tag(
    f"{OVERVIEW}/loss_val",
    "Cross-entropy on validation images, in nats, of a network trained by itself. It rises while"
    " `loss_train` falls: overfitting.",
)
LOSS_CE = _tag(
    f"{OVERVIEW}/loss_ce",
    "Cross-entropy with the labels, on training images, in nats, before its weight."
    " Guessing among C classes gives ln C.",
)
LOSS_KD = _tag(
    f"{OVERVIEW}/loss_kd",
    "Distillation, on training images, before its weight: divergence of the student's softened"
    " probabilities from the teacher's (Hinton et al. 2015). 0: the same probabilities.",
)
LOSS_MAPS = _tag(
    f"{OVERVIEW}/loss_maps",
    "Distance between the student's and the teacher's maps, on training images, summed over"
    " the layer pairs, before `beta`. 0: the same maps.",
)
ACCURACY_TRAIN = _tag(
    f"{OVERVIEW}/accuracy_train",
    "Share of training images (as augmented) whose top class is the label. 1 is perfect.",
)
ACCURACY_VAL = _tag(
    f"{OVERVIEW}/accuracy_val",
    "Share of validation images whose top class is the label, of a network trained by itself."
    " 1 is perfect.",
)
ACCURACY_STUDENT = _tag(
    f"{OVERVIEW}/accuracy_student",
    "Share of validation images for which the student's top class is the label. 1 is perfect.",
)
AGREEMENT = _tag(
    f"{OVERVIEW}/agreement",
    "Share of validation images for which student and teacher have the same top class. Needs no"
    " label. 1 is perfect; it may exceed the accuracy.",
)
PEARSON = _tag(
    f"{MAPS}/pearson",
    "Correlation of the student's map with the teacher's, on validation images, for the teacher's"
    " top class, averaged over images and layer pairs. 1 is the same map; 0 is unrelated, and what"
    " a blank student map gets.",
)
SPEARMAN = _tag(
    f"{MAPS}/spearman",
    "Of ranks: do both maps put the places in the same order, whatever their contrast?",
)
COSINE = _tag(
    f"{MAPS}/cosine",
    "Cosine of the two maps. Never negative after ReLU, and high for any two blobs in the middle:"
    " read `skill` beside it.",
)
SKILL = _tag(
    f"{MAPS}/skill",
    "How much of the way from always drawing the teacher's *mean* map to drawing the right one the"
    " student has come, by cosine. 1 is perfect; 0 is the mean map; below 0 is worse.",
)
LEARNING_RATE = _tag(f"{RUN}/learning_rate", "Step size of the optimiser.")
BETA = _tag(
    f"{RUN}/beta",
    "Weight of the maps' distance in the loss, after its schedule. 0: maps are ignored.",
)
IMAGES_PER_SECOND = _tag(
    f"{RUN}/images_per_second",
    "Training images a second over the epoch, all processes together, without the first steps of"
    " the process and without validation.",
)
HOW_TO_READ = _tag(f"{RUN}/how_to_read", "What every card means.")
CONFIG = _tag(f"{RUN}/config", "The configuration that made this run.")

# What one looks at first: of a student, and of a network that is trained by itself.
STUDENT_CARDS = (ACCURACY_STUDENT, AGREEMENT, PEARSON, SKILL)
CLASSIFIER_CARDS = (ACCURACY_VAL, LOSS_VAL)

_PEARSON = _stem(f"{MAPS}/pearson_", "`pearson` of one layer pair.")
_SPEARMAN = _stem(f"{MAPS}/spearman_", "`spearman` of one layer pair.")
_COSINE = _stem(f"{MAPS}/cosine_", "`cosine` of one layer pair.")
_SKILL = _stem(f"{MAPS}/skill_", "`skill` of one layer pair.")
_GRID = _stem(
    f"{MAPS}/grid_",
    "The same validation images each time: image, teacher's map, student's map, difference. Both"
    " maps are of the teacher's top class, after ReLU, each as a share of its own maximum. In the"
    " difference, red is where the student looks more, blue where the teacher does.",
)


def pearson(layer: str) -> str:
    """Tag of one layer pair's Pearson correlation."""
    return _PEARSON + _clean(layer)


def spearman(layer: str) -> str:
    """Tag of one layer pair's rank correlation."""
    return _SPEARMAN + _clean(layer)


def cosine(layer: str) -> str:
    """Tag of one layer pair's cosine."""
    return _COSINE + _clean(layer)


def skill(layer: str) -> str:
    """Tag of one layer pair's skill."""
    return _SKILL + _clean(layer)


def grid(layer: str) -> str:
    """Tag of one layer pair's pictures."""
    return _GRID + _clean(layer)


def on_test(tag: str) -> str:
    """The same quantity measured on test images: `1_overview/loss_val` gives `9_test/loss`."""
    return f"{TEST}/{short(tag).removesuffix('_val')}"


def short(tag: str) -> str:
    """The tag without its group: `loss_val`."""
    return tag.partition("/")[2]


def describe(tag: str) -> str:
    """What the card means, in Markdown; empty for a tag that isn't ours."""
    if tag in _DESCRIPTIONS:
        return _DESCRIPTIONS[tag]
    if tag.startswith(f"{TEST}/"):
        twin = next((known for known in _DESCRIPTIONS if on_test(known) == tag), None)
        twin = twin or f"{MAPS}/{short(tag)}"
        return f"On test images: {meaning}" if (meaning := describe(twin)) else ""
    stem = next((stem for stem in _OF_LAYERS if tag.startswith(stem)), None)
    return "" if stem is None else f"Layer {tag.removeprefix(stem)}. {_OF_LAYERS[stem]}"


def how_to_read() -> str:
    """A Markdown page that says what each card means."""
    rows = [f"| `{tag}` | {text} |" for tag, text in _DESCRIPTIONS.items()]
    rows += [f"| `{stem}<layer>` | {text} |" for stem, text in _OF_LAYERS.items()]
    return "\n".join(
        [
            "A **map** says where in the image a network finds evidence for a class (Grad-CAM). The"
            " **student** learns to classify like the **teacher** and to have its maps.",
            "",
            "| card | meaning |",
            "|---|---|",
            *sorted(rows),
            "",
            "Charts are smoothed by 0.6 unless told otherwise: set *Smoothing* to 0 to see what was"
            f" measured. `{TEST}/...` are the same quantities on test images.",
        ]
    )


def _clean(layer: str) -> str:
    """Layer names as tags: `layer1.0.relu#1` keeps its dots; a regular expression's signs go."""
    return re.sub(r"[^\w.-]", "-", layer)
