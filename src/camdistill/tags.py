"""TensorBoard's tags and what each card means, in one place.

A tag has exactly one slash: what stands before it is the group, and the numbers put the groups in
order. TensorBoard unfolds only the first two groups, so these hold what one looks at first. Tags of
one layer are made by functions; every other tag is a constant. The list is long and stays one: the
page that explains the cards is made of it, whichever rooms are imported.
"""

import re
from collections.abc import Collection

EVALUATION = "0_evaluation"
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
LOSS_KEPT = _tag(
    f"{OVERVIEW}/loss_kept",
    "Of a network that is refined, on training images, in nats: cross-entropy with the labels, or"
    " without labels the divergence from its own answers at the start.",
)
LOSS_OBJECTIVE = _tag(
    f"{OVERVIEW}/loss_objective",
    "What a refined network's maps are trained to be, on training images, before its weight."
    " Smaller is better; it may not judge what it trained: see the held-out metrics.",
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
AGREEMENT_START = _tag(
    f"{OVERVIEW}/agreement_start",
    "Share of validation images for which a refined network has the top class that it had at the"
    " start.",
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
RUNNER_UP = _tag(
    f"{MAPS}/runner_up",
    "Correlation of the student's and the teacher's *signed* maps of the teacher's second likeliest"
    " class. Near `pearson`: the maps depend on the class as the teacher's do; near 0 or below: the"
    " student draws one map whatever class it is asked for.",
)
GAIN = _tag(
    f"{OVERVIEW}/simulatability_gain",
    "What students taught with a method's maps agree with the teacher on unseen images more than"
    " students without maps; the step is the number of training images. 0: the maps teach nothing.",
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
FAITHFULNESS = _tag(
    f"{EVALUATION}/faithfulness",
    "Explainers and controls by every metric that asks the network, with 95 % intervals over"
    " images. A metric by which a control stands above an explainer ranks nothing.",
)
LOCALISATION = _tag(
    f"{EVALUATION}/localisation",
    "Explainers and controls by what is known of the images: the objects' masks. It is about the"
    " network only where the network looks at the object.",
)
CURVES = _tag(
    f"{EVALUATION}/curves",
    "Mean probability of the explained class as pixels are put into a blurred image (insertion: the"
    " higher, the better) or greyed (deletion: the lower), most relevant first.",
)
BEST_AND_WORST = _tag(
    f"{EVALUATION}/best_and_worst",
    "The images whose map the first ranking metric likes most, and least.",
)
REFINED = _tag(
    f"{EVALUATION}/map_parts",
    "What a refined network's own map gained by every metric, less what its start's map gained on"
    " the same network; 95 % intervals over starts and images. 0: only the answers changed.",
)
MAP_PART = _tag(
    f"{EVALUATION}/map_part_of_road",
    "ROAD of a refined network's map less that of its start's map, both on the refined network;"
    " test images. Step: the chosen epoch. 0: only the answers changed, if anything.",
)
REFINED_MAPS = _tag(
    f"{MAPS}/refined",
    "The same test images: the start network's map, and that of what each arm made of it, each as a"
    " share of its own maximum. Step: number of the image.",
)
EVALUATION_TABLE = _tag(f"{EVALUATION}/table", "All numbers, and what to beware of.")
CLAIMS_TABLE = _tag(
    f"{EVALUATION}/claims",
    "The Grad-CAM paper's claims: its numbers, ours, the criterion, and whether the claim holds.",
)
CLAIMS_LOCALISATION = _tag(
    f"{EVALUATION}/claims_localisation",
    "What the paper says of where maps lie, row by row, with 95 % intervals.",
)
CLAIMS_FAITHFULNESS = _tag(
    f"{EVALUATION}/claims_faithfulness",
    "What it says of maps and the network's behaviour, of layers, and its ablations.",
)
CLAIMS_WORLDS = _tag(
    f"{EVALUATION}/claims_worlds",
    "What it says of observers, trust, bias, counterfactuals and adversaries, each in a little"
    " world whose truth is known.",
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

# Against depth: the step is the layer's depth in percent, not a training step.
_DEPTH = (
    " Step: depth in percent, 0 the first layer and 100 the last (of more than 101 layers in"
    " thousandths, to 1000); a run a network."
)
_PROFILES = {
    "active": "Share of values above 0 after the non-linearity.",
    "dead": "Share of units that gave 0 everywhere. Of a network in training it is an alarm; of a"
    " finished one a property. None in N images still allows a rate of 3/N.",
    "nearly_dead": "Share of units above 0 in fewer than one image in a thousand, but not never.",
    "always_on": "Share of units above 0 at more than 99.9 % of places: their ReLU does nothing.",
    "population_sparsity": "How few units carry an image (Vinje and Gallant 2000), averaged over"
    " images. 0: all alike; 1: one alone.",
    "lifetime_sparsity": "In how few images a unit is active, averaged over units. 0: in all alike;"
    " 1: in one alone.",
    "hoyer": "Sparsity of all values together (Hoyer 2004). 0: evenly spread; 1: one alone.",
    "effective_rank": "In how many directions the layer's spatial means vary (exp of the singular"
    " values' entropy; Roy and Vetterli 2007), as a share of what was possible.",
    "participation": "Participation ratio of the same directions, as a share of what was possible.",
    "saturation": "Smallest share of directions that holds 99 % of the variance.",
    "largest": "The largest value anywhere.",
    "probe": "Accuracy of a linear readout of the layer's spatial means on held-out images, a"
    " fifth of all (1,000 at most), fitted on the others.",
    "probe_untrained": "The same of the network with random weights: what the architecture gives.",
    "cam_scale": "Grad-CAM's largest value times the number of cells, in logits: median over"
    " images.",
    "cam_blank": "Share of images whose Grad-CAM is 0 everywhere at this layer.",
}
PROFILES = tuple(_tag(f"{PROFILE}/{name}", text + _DEPTH) for name, text in _PROFILES.items())
WEIGHT_NORM = _tag(f"{FILTERS}/norm", "Median length of the layer's filters as vectors." + _DEPTH)
BEST_CKA = _tag(
    f"{SIMILARITY}/best_cka",
    "CKA with the most similar layer of the other network. 1: the same up to rotation and scale."
    + _DEPTH,
)
MATCHED = _tag(
    f"{SIMILARITY}/matched",
    "Mean correlation of a student's unit with the teacher's unit that it follows best." + _DEPTH,
)

# Histograms whose step is the layer's number: the card shows the whole network, one ridge a layer.
RIDGE = _tag(
    f"{ACTIVATIONS}/ridge",
    "Values above 0 after the non-linearity, in powers of ten (0 is 1, -2 is 0.01). Step: number of"
    " the layer. Zeros are left out; their share is `zeros`.",
)
RIDGE_BEFORE = _tag(
    f"{ACTIVATIONS}/ridge_before_relu",
    "Values given to the non-linearity, as shares of the magnitude that 99.9 % of them stay below:"
    " what is left of 0 a ReLU cuts away. Step: number of the layer.",
)
ZEROS = _tag(f"{ACTIVATIONS}/zeros", "Share of values that are exactly 0." + _DEPTH)
NONFINITE = _tag(
    f"{ACTIVATIONS}/nonfinite", "Values that are NaN or infinite; 0 is healthy." + _DEPTH
)
WEIGHTS_RIDGE = _tag(
    f"{FILTERS}/weights",
    "Weights in units of the layer's largest magnitude. Step: number of the layer.",
)
NORMS_RIDGE = _tag(
    f"{FILTERS}/norms",
    "Lengths of the layer's filters as vectors, as shares of the longest; at 0 are dead ones. Step:"
    " number of the layer; `norm` has the median itself.",
)

# Pictures of an analysis.
FINDINGS = _tag(f"{OVERVIEW}/findings", "What stands out, the most serious first.")
LAYERS = _tag(f"{OVERVIEW}/layers", "Every layer's numbers, in a table a network.")
PROFILE_CHART = _tag(
    f"{OVERVIEW}/profiles", "The statistics of `3_profile` against depth, a line a network."
)
CKA_CHART = _tag(
    f"{SIMILARITY}/cka",
    "Linear CKA (unbiased, in minibatches) of every teacher's layer with every student's layer."
    " Equal depth should be bright; a dark row is a layer that the student has nothing of.",
)
CKA_WITHIN = _tag(
    f"{SIMILARITY}/cka_within",
    "Linear CKA (unbiased, in minibatches) of every layer with every other of the same network. 1"
    " on the diagonal; a bright block is a run of layers that change little.",
)
CAM_CHART = _tag(
    f"{SIMILARITY}/cam_cosine",
    "Mean cosine of the two networks' Grad-CAM maps, of the same class, layer by layer.",
)
RIDGE_CHART = _tag(
    f"{ACTIVATIONS}/ridges", "Activations above 0 of all layers; the share of zeros at the right."
)
FIRST_SHAPE = _tag(
    f"{FILTERS}/first_shape",
    "The first convolution's filters, each by its own largest weight: zero is grey.",
)
FIRST_SIZE = _tag(
    f"{FILTERS}/first_size",
    "The same filters on one scale: a weak or dead filter stays grey. Norms are below.",
)
WEIGHTS_CHART = _tag(
    f"{FILTERS}/weights_through_depth",
    "Magnitudes of every layer's weights, in powers of ten; the share of zeros at the right.",
)
NORMS_CHART = _tag(
    f"{FILTERS}/norms_chart",
    "Lengths of every layer's filters as vectors, in powers of ten: a filter far left of the others"
    " of its layer does next to nothing; the share of those without any weight at the right.",
)
THROUGH_DEPTH = _tag(
    f"{MAPS}/through_depth",
    "Maps of one image at all layers (of more than 60 at 60, evenly spread, and the picture says"
    " so), all of the class in the title; the bar is the map's maximum in logits. Grad-CAM weighs a"
    " unit by its mean gradient, which says little at early layers; LayerCAM weighs each cell by"
    " its own. Step: number of the image.",
)

FORMING = _tag(
    f"{PROFILE}/forming",
    "The layers' numbers through depth, on the same images each time: a line an epoch, from dark"
    " to bright.",
)
# Of one layer, while training.
OF_LAYERS = ("active", "dead", "effective_rank")
_BY_STATISTIC = {
    name: _stem(f"{ACTIVATIONS}/{name}_", _PROFILES[name] + " On the same images each epoch.")
    for name in OF_LAYERS
}
_WEIGHTS = _stem(f"{FILTERS}/weights_", "The layer's weights.")
_NORMS = _stem(f"{FILTERS}/norms_", "Lengths of the layer's filters as vectors.")
_LOG10 = _stem(
    f"{ACTIVATIONS}/log10_",
    "Values above 0 after the non-linearity, in powers of ten, on the same images each epoch.",
)
_UNITS = _stem(
    f"{UNITS}/cards_",
    "Cards of some units: the pieces of images that excite each most, cut to what it sees, their"
    " mean, an image made to excite it (what it reached before the ReLU, and as a multiple of the"
    " largest value in the data: above 1 it is further than anything there), of a first layer its"
    " filter, the histogram of its activations, what it responds to.",
)
_PAIRS = _stem(
    f"{UNITS}/pairs_",
    "The student's units of this layer that follow a teacher's unit most closely (correlation of"
    " their spatial means over images, paired one to one), each on the right of the unit that it"
    " follows: do the same pieces of images excite both?",
)
_FEATURES = _stem(
    f"{UNITS}/maps_",
    "Feature maps of one image: the units whose weight in Grad-CAM is largest, up or down.",
)


def profile(name: str) -> str:
    """Tag of a statistic against depth."""
    return f"{PROFILE}/{name}"


def log10(layer: str) -> str:
    """Tag of one layer's histogram while training."""
    return _LOG10 + _clean(layer)


def of_layer(statistic: str, layer: str) -> str:
    """Tag of one of `OF_LAYERS` of one layer while training."""
    return _BY_STATISTIC[statistic] + _clean(layer)


def weights(layer: str) -> str:
    """Tag of one layer's weights while training."""
    return _WEIGHTS + _clean(layer)


def norms(layer: str) -> str:
    """Tag of the lengths of one layer's filters while training."""
    return _NORMS + _clean(layer)


def unit_pairs(layer: str) -> str:
    """Tag of the pairs of teacher's and student's units, by the student's layer."""
    return _PAIRS + _clean(layer)


def unit_cards(layer: str) -> str:
    """Tag of one layer's unit cards."""
    return _UNITS + _clean(layer)


def feature_maps(layer: str) -> str:
    """Tag of one layer's feature maps."""
    return _FEATURES + _clean(layer)


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
    stem = _stem_of(tag)
    return "" if stem is None else f"Layer {tag.removeprefix(stem)}. {_OF_LAYERS[stem]}"


def _stem_of(tag: str) -> str | None:
    """What the layer's name follows in a tag of one layer."""
    return next((stem for stem in _OF_LAYERS if tag.startswith(stem)), None)


def how_to_read(groups: Collection[str] = (), cards: Collection[str] | None = None) -> str:
    """A Markdown page that says what each card means; of some groups, or of all.

    Args:
        groups: Which; empty for all.
        cards: Tags that were written, where no others shall be told.
    """
    told = _DESCRIPTIONS | {f"{stem}<layer>": text for stem, text in _OF_LAYERS.items()}
    if cards is not None:
        known = {tag if tag in _DESCRIPTIONS else f"{_stem_of(tag)}<layer>" for tag in cards}
        told = {tag: text for tag, text in told.items() if tag in known}
    rows = [
        f"| `{tag}` | {text} |"
        for tag, text in told.items()
        if not groups or tag.partition("/")[0] in groups
    ]
    words = "A **map** says where in the image a network finds evidence for a class (Grad-CAM)."
    if any("student" in row for row in rows):
        words += " The **student** learns to classify like the **teacher** and to have its maps."
    smoothed = (
        "Charts are smoothed by 0.6 unless told otherwise: set *Smoothing* to 0 to see what was"
        " measured."
    )
    if cards is None or any(card.startswith(f"{TEST}/") for card in cards):
        smoothed += f" `{TEST}/...` are the same quantities on test images."
    return "\n".join(
        [
            words,
            "",
            "| card | meaning |",
            "|---|---|",
            *sorted(rows),
            "",
            smoothed,
        ]
    )


def _clean(layer: str) -> str:
    """Layer names as tags: `layer1.0.relu#1` keeps its dots; a regular expression's signs go."""
    return re.sub(r"[^\w.-]", "-", layer)
