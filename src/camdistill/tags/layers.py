"""Cards of the layers: of an analysis, and of layers while they train."""

from camdistill.tags.groups import (
    ACTIVATIONS,
    FILTERS,
    MAPS,
    OVERVIEW,
    PROFILE,
    SIMILARITY,
    UNITS,
    card,
    card_of_layer,
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
    "cam_scale": "Grad-CAM's largest value, in logits per cell: median over images.",
    "cam_blank": "Share of images whose Grad-CAM is 0 everywhere at this layer.",
}
PROFILES = tuple(card(f"{PROFILE}/{name}", text + _DEPTH) for name, text in _PROFILES.items())
WEIGHT_NORM = card(f"{FILTERS}/norm", "Median length of the layer's filters as vectors." + _DEPTH)
BEST_CKA = card(
    f"{SIMILARITY}/best_cka",
    "CKA with the most similar layer of the other network. 1: the same up to rotation and scale."
    + _DEPTH,
)
MATCHED = card(
    f"{SIMILARITY}/matched",
    "Mean correlation of a student's unit with the teacher's unit that it follows best." + _DEPTH,
)

# Histograms whose step is the layer's number: the card shows the whole network, one ridge a layer.
RIDGE = card(
    f"{ACTIVATIONS}/ridge",
    "Values above 0 after the non-linearity, in powers of ten (0 is 1, -2 is 0.01). Step: number of"
    " the layer. Zeros are left out; their share is `zeros`.",
)
RIDGE_BEFORE = card(
    f"{ACTIVATIONS}/ridge_before_relu",
    "Values given to the non-linearity, as shares of the magnitude that 99.9 % of them stay below:"
    " what is left of 0 a ReLU cuts away. Step: number of the layer.",
)
ZEROS = card(f"{ACTIVATIONS}/zeros", "Share of values that are exactly 0." + _DEPTH)
NONFINITE = card(
    f"{ACTIVATIONS}/nonfinite", "Values that are NaN or infinite; 0 is healthy." + _DEPTH
)
WEIGHTS_RIDGE = card(
    f"{FILTERS}/weights",
    "Weights in units of the layer's largest magnitude. Step: number of the layer.",
)
NORMS_RIDGE = card(
    f"{FILTERS}/norms",
    "Lengths of the layer's filters as vectors, as shares of the longest; at 0 are dead ones. Step:"
    " number of the layer; `norm` has the median itself.",
)

# Pictures of an analysis.
FINDINGS = card(f"{OVERVIEW}/findings", "What stands out, the most serious first.")
LAYERS = card(f"{OVERVIEW}/layers", "Every layer's numbers, in a table a network.")
PROFILE_CHART = card(
    f"{OVERVIEW}/profiles", "The statistics of `3_profile` against depth, a line a network."
)
CKA_CHART = card(
    f"{SIMILARITY}/cka",
    "Linear CKA (unbiased, in minibatches) of every teacher's layer with every student's layer."
    " Equal depth should be bright; a dark row is a layer that the student has nothing of.",
)
CKA_WITHIN = card(
    f"{SIMILARITY}/cka_within",
    "Linear CKA (unbiased, in minibatches) of every layer with every other of the same network. 1"
    " on the diagonal; a bright block is a run of layers that change little.",
)
CAM_CHART = card(
    f"{SIMILARITY}/cam_cosine",
    "Mean cosine of the two networks' Grad-CAM maps, of the same class, layer by layer.",
)
RIDGE_CHART = card(
    f"{ACTIVATIONS}/ridges", "Activations above 0 of all layers; the share of zeros at the right."
)
FIRST_SHAPE = card(
    f"{FILTERS}/first_shape",
    "The first convolution's filters, each by its own largest weight: zero is gray.",
)
FIRST_SIZE = card(
    f"{FILTERS}/first_size",
    "The same filters on one scale: a weak or dead filter stays gray. Norms are below.",
)
WEIGHTS_CHART = card(
    f"{FILTERS}/weights_through_depth",
    "Magnitudes of every layer's weights, in powers of ten; the share of zeros at the right.",
)
NORMS_CHART = card(
    f"{FILTERS}/norms_chart",
    "Lengths of every layer's filters as vectors, in powers of ten: a filter far left of the others"
    " of its layer does next to nothing; the share of those without any weight at the right.",
)
THROUGH_DEPTH = card(
    f"{MAPS}/through_depth",
    "Maps of one image at all layers (of more than 60 at 60, evenly spread, and the picture says"
    " so), all of the class in the title; the bar is the map's maximum in logits per cell."
    " Grad-CAM weighs a unit by its mean gradient, which says little at early layers; LayerCAM"
    " weighs each cell by its own. Step: number of the image.",
)

FORMING = card(
    f"{PROFILE}/forming",
    "The layers' numbers through depth, on the same images each time: a line an epoch, from dark"
    " to bright.",
)
# Of one layer, while training.
OF_LAYERS = ("active", "dead", "effective_rank")
_BY_STATISTIC = {
    name: card_of_layer(
        f"{ACTIVATIONS}/{name}_", _PROFILES[name] + " On the same images each epoch."
    )
    for name in OF_LAYERS
}
weights = card_of_layer(f"{FILTERS}/weights_", "The layer's weights.")
norms = card_of_layer(f"{FILTERS}/norms_", "Lengths of the layer's filters as vectors.")
log10 = card_of_layer(
    f"{ACTIVATIONS}/log10_",
    "Values above 0 after the non-linearity, in powers of ten, on the same images each epoch.",
)
unit_cards = card_of_layer(
    f"{UNITS}/cards_",
    "Cards of some units: the pieces of images that excite each most, cut to what it sees, their"
    " mean, an image made to excite it (what it reached after the ReLU, as a multiple of the"
    " largest value in the data: above 1 it is further than anything there; failed if random"
    " images excite the unit as much), of a first layer its filter, the histogram of its"
    " activations, what it responds to.",
)
unit_pairs = card_of_layer(
    f"{UNITS}/pairs_",
    "The student's units of this layer that follow a teacher's unit most closely (correlation of"
    " their spatial means over images, paired one to one), each on the right of the unit that it"
    " follows: do the same pieces of images excite both?",
)
feature_maps = card_of_layer(
    f"{UNITS}/maps_",
    "Feature maps of one image: the units whose weight in Grad-CAM is largest, up or down.",
)


def profile(name: str) -> str:
    """Tag of a statistic against depth."""
    return f"{PROFILE}/{name}"


def of_layer(statistic: str, layer: str) -> str:
    """Tag of one of `OF_LAYERS` of one layer while training."""
    return _BY_STATISTIC[statistic](layer)
