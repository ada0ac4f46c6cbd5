import re
from functools import partial

import pytest

from camdistill import tags

CONSTANTS = [
    value
    for name, value in vars(tags).items()
    if name.isupper() and isinstance(value, str) and "/" in value and not name.startswith("_")
]
OF_LAYER = [
    *(tags.pearson, tags.spearman, tags.cosine, tags.skill, tags.grid),
    *(tags.log10, tags.unit_cards, tags.feature_maps, tags.weights, tags.norms),
    *(partial(tags.of_layer, statistic) for statistic in tags.OF_LAYERS),
]


@pytest.mark.parametrize("tag", [*CONSTANTS, *tags.PROFILES])
def test_every_tag_has_one_slash_a_numbered_group_and_a_description(tag: str) -> None:
    assert re.fullmatch(r"\d_[a-z]+/[a-z_]+", tag)
    assert len(tags.describe_card(tag)) > 10


@pytest.mark.parametrize("make", OF_LAYER)
@pytest.mark.parametrize("layer", ["layer3", "layer1.0.relu#1", "stage5", "a/b (c)+"])
def test_tags_of_layers_have_one_slash_no_sign_of_a_pattern_and_name_their_layer(
    make, layer: str
) -> None:
    tag = make(layer)
    assert re.fullmatch(r"\d_[a-z]+/[\w.-]+", tag)
    named = re.sub(r"[^\w.-]", "-", layer)
    assert tag.endswith(f"_{named}")
    assert tags.describe_card(tag).startswith(f"Layer {named}. ")


def test_tags_of_two_calls_of_one_layer_differ() -> None:
    assert tags.pearson("relu#1") != tags.pearson("relu_1")
    assert tags.pearson("relu#1") != tags.pearson("relu#2")


def test_tests_have_their_own_group_and_keep_the_description() -> None:
    assert tags.on_test(tags.LOSS_VAL) == "9_test/loss"
    assert tags.on_test(tags.ACCURACY_STUDENT) == "9_test/accuracy_student"
    assert tags.on_test(tags.pearson("layer3")) == "9_test/pearson_layer3"
    assert (
        tags.describe_card("9_test/loss") == f"On test images: {tags.describe_card(tags.LOSS_VAL)}"
    )
    assert "Layer layer3" in tags.describe_card("9_test/pearson_layer3")


def test_foreign_tags_have_no_description() -> None:
    assert (
        tags.describe_card("epoch")
        == tags.describe_card("9_test/epoch")
        == tags.describe_card("a/b")
        == ""
    )


def test_page_of_some_groups_names_no_others() -> None:
    page = tags.how_to_read([tags.PROFILE, tags.UNITS])
    assert "`3_profile/dead`" in page
    assert "`7_units/cards_<layer>`" in page
    assert "`1_overview/" not in page


def test_page_of_some_cards_names_no_others() -> None:
    page = tags.how_to_read(cards=[tags.RIDGE, tags.unit_cards("layer3"), "foreign"])
    told = re.findall(r"^\| `([^`]+)` ", page, re.MULTILINE)
    assert told == [tags.RIDGE, "7_units/cards_<layer>"]


def test_page_names_every_card() -> None:
    page = tags.how_to_read()
    assert all(f"`{tag}`" in page for tag in CONSTANTS)
    assert "`2_maps/grid_<layer>`" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(row.count("|") == 3 for row in rows), "a cell with a bar breaks the table"
