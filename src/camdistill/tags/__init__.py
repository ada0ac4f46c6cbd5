"""TensorBoard's tags and what each card means: `tags.LOSS_TRAIN`, `tags.weights(layer)`.

Every room takes its tags from here. Tags of one layer are made by functions; every other tag is a
constant. All lists are read together, so that the page that explains the cards has them all,
whichever rooms are imported.
"""

# The front of the lists: all that they name is named here.
# ruff: noqa: F403
from camdistill.tags.evaluation import *
from camdistill.tags.groups import *
from camdistill.tags.layers import *
from camdistill.tags.page import *
from camdistill.tags.training import *
