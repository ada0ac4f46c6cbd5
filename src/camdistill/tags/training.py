"""Cards of training: losses, accuracies, how alike the maps are; the run itself."""

from camdistill.tags.groups import MAPS, OVERVIEW, RUN, card, card_of_layer

LOSS_TRAIN = card(
    f"{OVERVIEW}/loss_train",
    "What is minimized, on training images: `ce` x cross-entropy + `kd` x distillation + `beta` x"
    " distance of the maps (a teacher's own training has the first term only). Smaller is better;"
    " compare only runs that have the same weights.",
)
LOSS_VAL = card(
    f"{OVERVIEW}/loss_val",
    "Cross-entropy on validation images, in nats, of a network trained by itself. It rises while"
    " `loss_train` falls: overfitting.",
)
LOSS_CE = card(
    f"{OVERVIEW}/loss_ce",
    "Cross-entropy with the labels, on training images, in nats, before its weight."
    " Guessing among C classes gives ln C.",
)
LOSS_KD = card(
    f"{OVERVIEW}/loss_kd",
    "Distillation, on training images, before its weight: divergence of the student's softened"
    " probabilities from the teacher's (Hinton et al. 2015). 0: the same probabilities.",
)
LOSS_MAPS = card(
    f"{OVERVIEW}/loss_maps",
    "Distance between the student's and the teacher's maps, on training images, summed over"
    " the layer pairs, before `beta`. 0: the same maps.",
)
LOSS_KEPT = card(
    f"{OVERVIEW}/loss_kept",
    "Of a network that is refined, on training images, in nats: cross-entropy with the labels, or"
    " without labels the divergence from its own answers at the start.",
)
LOSS_OBJECTIVE = card(
    f"{OVERVIEW}/loss_objective",
    "What a refined network's maps are trained to be, on training images, before its weight."
    " Smaller is better; it may not judge what it trained: see the held-out metrics.",
)
ACCURACY_TRAIN = card(
    f"{OVERVIEW}/accuracy_train",
    "Share of training images (as augmented) whose top class is the label. 1 is perfect.",
)
ACCURACY_VAL = card(
    f"{OVERVIEW}/accuracy_val",
    "Share of validation images whose top class is the label, of a network trained by itself."
    " 1 is perfect.",
)
ACCURACY_STUDENT = card(
    f"{OVERVIEW}/accuracy_student",
    "Share of validation images for which the student's top class is the label. 1 is perfect.",
)
AGREEMENT = card(
    f"{OVERVIEW}/agreement",
    "Share of validation images for which student and teacher have the same top class. Needs no"
    " label. 1 is perfect; it may exceed the accuracy.",
)
AGREEMENT_START = card(
    f"{OVERVIEW}/agreement_start",
    "Share of validation images for which a refined network has the top class that it had at the"
    " start.",
)
PEARSON = card(
    f"{MAPS}/pearson",
    "Correlation of the student's map with the teacher's, on validation images, for the teacher's"
    " top class, averaged over images and layer pairs. 1 is the same map; 0 is unrelated, and what"
    " a blank student map gets.",
)
SPEARMAN = card(
    f"{MAPS}/spearman",
    "Of ranks: do both maps put the places in the same order, whatever their contrast?",
)
COSINE = card(
    f"{MAPS}/cosine",
    "Cosine of the two maps. Never negative after ReLU, and high for any two blobs in the middle:"
    " read `skill` beside it.",
)
SKILL = card(
    f"{MAPS}/skill",
    "How much of the way from always drawing the teacher's *mean* map to drawing the right one the"
    " student has come, by cosine. 1 is perfect; 0 is the mean map; below 0 is worse.",
)
RUNNER_UP = card(
    f"{MAPS}/runner_up",
    "Correlation of the student's and the teacher's *signed* maps of the teacher's second likeliest"
    " class. Near `pearson`: the maps depend on the class as the teacher's do; near 0 or below: the"
    " student draws one map whatever class it is asked for.",
)
LEARNING_RATE = card(f"{RUN}/learning_rate", "Step size of the optimizer.")
BETA = card(
    f"{RUN}/beta",
    "Weight of the maps' distance in the loss, after its schedule. 0: maps are ignored.",
)
IMAGES_PER_SECOND = card(
    f"{RUN}/images_per_second",
    "Training images a second over the epoch, all processes together, without the first steps of"
    " the process and without validation.",
)
HOW_TO_READ = card(f"{RUN}/how_to_read", "What every card means.")
CONFIG = card(f"{RUN}/config", "The configuration that made this run.")

# What one looks at first: of a student, and of a network that is trained by itself.
STUDENT_CARDS = (ACCURACY_STUDENT, AGREEMENT, PEARSON, SKILL)
CLASSIFIER_CARDS = (ACCURACY_VAL, LOSS_VAL)

pearson = card_of_layer(f"{MAPS}/pearson_", "`pearson` of one layer pair.")
spearman = card_of_layer(f"{MAPS}/spearman_", "`spearman` of one layer pair.")
cosine = card_of_layer(f"{MAPS}/cosine_", "`cosine` of one layer pair.")
skill = card_of_layer(f"{MAPS}/skill_", "`skill` of one layer pair.")
grid = card_of_layer(
    f"{MAPS}/grid_",
    "The same validation images each time: image, teacher's map, student's map, difference. Both"
    " maps are of the teacher's top class, after ReLU, each as a share of its own maximum. In the"
    " difference, red is where the student looks more, blue where the teacher does.",
)
