"""What a distillation must have before anything is spent on it."""

from camdistill.errors import UserError, check_number


def demand_weights(*, ce: float, kd: float, beta: float, temperature: float) -> None:
    """Checks the weights of the loss.

    Raises:
        UserError: If one is negative, all are 0, or the temperature is not above 0.
    """
    for name, weight in (("ce", ce), ("kd", kd), ("beta", beta)):
        check_number(name, weight, "[0, inf)", "a weight of the loss is 0 or more")
    if ce == kd == beta == 0:
        raise UserError("ce, kd and beta are all 0: there is nothing to learn; give one a weight")
    check_number("temperature", temperature, "(0, inf)", "give a number above 0, usually 4")


def demand_labels(found: int, wanted: int, ce: float) -> None:
    """Checks that cross-entropy has the labels it needs.

    Args:
        found: Number of the data's classes, 0 without labels.
        wanted: Number of the teacher's.
        ce: Weight of cross-entropy.

    Raises:
        UserError: If the numbers differ and cross-entropy has a weight.
    """
    if not ce or found == wanted:
        return
    if not found:
        raise UserError(f"the images have no labels, but ce is {ce}; --model.ce 0 trains without")
    raise UserError(
        f"the images have {found} classes, the teacher {wanted}; --model.ce 0 distils the "
        "teacher's own classes, or fine-tune a teacher for yours with Classifier"
    )
