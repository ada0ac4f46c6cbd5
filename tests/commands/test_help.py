"""What `--help` says of options: one line each in a group, with the default that really stands."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from camdistill.commands.help import command_help, loop_help
from camdistill.errors import UserError


@dataclass(frozen=True)
class Rate:
    """How fast.

    Args:
        lr: The rate.
        kind: Of the rate: how it falls and why.
    """

    lr: float = 0.3
    kind: Literal["flat", "steep"] = "flat"


@dataclass(frozen=True)
class Recipe:
    """How.

    Args:
        rate: Of learning.
        shares: Of everything, in an order that takes many more words to tell than there are in a
            line of one hundred letters. Twice.
        many: Numbers.
    """

    rate: Rate = field(default_factory=lambda: Rate(lr=0.01))
    shares: tuple[float, ...] = (0.5, 1.0)
    many: list[int] = field(default_factory=lambda: list(range(40)))


def command(
    recipe: Recipe,
    other: Recipe = Recipe(rate=Rate(kind="steep")),
    seeds: list[int] = [3, 4],  # noqa: B006
    arms: list[Literal["a", "b"]] = ["a"],  # noqa: B006
    count: int | None = None,
) -> None:
    """Does something.

    Args:
        recipe: The first.
        other: The second.
        seeds: Of all.
        arms: Which.
        count: How many. Default: what there is.
    """


def line_of(text: str, option: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"  {option} "))
    return found


def test_options_of_a_group_have_a_line_each_with_their_default() -> None:
    told = command_help("do", command)
    assert all(len(line) <= 100 for line in told.splitlines())
    assert line_of(told, "--recipe.shares").endswith("... Default: [0.5, 1.0].")
    assert line_of(told, "--recipe.many").endswith("Numbers. Default: 0 1 ... 39.")
    assert line_of(told, "--recipe.rate.*").endswith("Of learning (lr, kind)")
    assert "--recipe.rate.lr" not in told
    assert "recipe: The first. All of it: camdistill do --help recipe" in told
    assert told.index("--count") < told.index("recipe: The first")


def test_lists_have_their_default_and_what_a_text_says_stays() -> None:
    told = command_help("do", command)
    assert line_of(told, "--seeds").endswith("Of all. Default: 3 4.")
    assert line_of(told, "--arms NAME ...").endswith("Which. Default: a.")
    assert line_of(told, "--count N").endswith("How many. Default: what there is.")


def test_a_groups_help_tells_all_with_the_defaults_of_its_own_place() -> None:
    """Of the second one the rate was chosen by the command, of the first by the dataclass."""
    first, second = (command_help("do", command, name) for name in ("recipe", "other"))
    assert line_of(first, "--recipe.rate.lr").endswith("The rate. Default: 0.01.")
    assert line_of(second, "--other.rate.lr").endswith("The rate. Default: 0.3.")
    assert "Default: steep." in second
    assert "Default: flat." in first
    assert "Twice." in first
    assert "--other" not in first


def test_a_group_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="do has no group of options 'recpe'; nearest: 'recipe'"):
        command_help("do", command, "recpe")


@pytest.mark.parametrize(
    ("loop", "told"), [("fit", "Go on from here"), ("test", "What to measure")]
)
def test_every_option_of_a_loop_says_what_it_is(loop: str, told: str) -> None:
    text = loop_help([loop, "-c", "configs/shapes.yaml"])
    options = text.partition("options\n")[2].partition("\n\n")[0].splitlines()
    assert all(len(row) > 40 for row in options if row.startswith("  -")), options
    assert told in line_of(text, "--ckpt_path FILE|last")
