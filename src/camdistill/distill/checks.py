"""What a distillation must have before anything is spent on it."""

import logging
from collections.abc import Sequence

from camdistill.errors import UserError, check_number
from camdistill.networks.training_facts import TrainingFacts

log = logging.getLogger(__name__)


def check_loss_weights(*, ce: float, kd: float, beta: float, temperature: float) -> None:
    """Checks the weights of the loss.

    Raises:
        UserError: If one is negative, all are 0, or the temperature is not above 0.
    """
    for name, weight in (("ce", ce), ("kd", kd), ("beta", beta)):
        check_number(name, weight, "[0, inf)", "a weight of the loss is 0 or more")
    if ce == kd == beta == 0:
        raise UserError("ce, kd and beta are all 0: there is nothing to learn; give one a weight")
    check_number("temperature", temperature, "(0, inf)", "give a number above 0, usually 4")


def check_label_count(data_classes: int, teacher_classes: int, ce: float) -> None:
    """Checks that cross-entropy has the labels it needs.

    Args:
        data_classes: Number of the data's classes, 0 without labels.
        teacher_classes: Number that the teacher tells apart: two by a single logit.
        ce: Weight of cross-entropy.

    Raises:
        UserError: If the numbers differ and cross-entropy has a weight.
    """
    if not ce or data_classes == teacher_classes:
        return
    if not data_classes:
        raise UserError(f"the images have no labels, but ce is {ce}; --model.ce 0 trains without")
    raise UserError(
        f"the images have {data_classes} classes, the teacher {teacher_classes}; --model.ce 0 "
        "distils the "
        "teacher's own classes, or fine-tune a teacher for yours with Classifier"
    )


def check_data_matches(
    facts: TrainingFacts, size: tuple[int, int], classes: Sequence[str], who: str
) -> None:
    """Checks the data against the images that a network was trained on, as far as its file says.

    The log says where the size differs, and what is assumed where the file doesn't say it.

    Args:
        facts: Facts of the network.
        size: Height and width of the data's images in pixels.
        classes: Names of the data's classes.
        who: What the network is, for messages.

    Raises:
        UserError: If the classes have the same names in another order: labels would be wrong.
    """
    trained_classes = facts.class_names
    if trained_classes != tuple(classes) and sorted(trained_classes) == sorted(classes):
        index = next(
            number for number, name in enumerate(trained_classes) if name != classes[number]
        )
        raise UserError(
            f"class {index} is '{classes[index]}' in the data and '{trained_classes[index]}' in "
            f"the {who}: the "
            "classes are the same in another order; name the folders so that they sort as the "
            f"{who}'s classes do"
        )
    if facts.size is not None and facts.size != size:
        trained_size, data_size = ("x".join(map(str, sides)) for sides in (facts.size, size))
        log.warning(
            "the %s was trained on images of %s pixels, the data's have %s",
            who,
            trained_size,
            data_size,
        )
