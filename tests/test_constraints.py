"""The versions that passed lie within the bounds of what is asked for."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
}


NEEDED = [
    *PROJECT["dependencies"],
    *(text for extra in EXTRAS.values() for text in extra if not text.startswith("camdistill[")),
]


@pytest.mark.parametrize("text", NEEDED)
def test_what_the_tests_need_is_pinned_within_its_bounds(text: str) -> None:
    asked = Requirement(text)
    assert asked.specifier.contains(PINNED[canonicalize_name(asked.name)]), text
