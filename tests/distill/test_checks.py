"""What is checked before a distillation."""

import logging

import pytest

from camdistill.distill.checks import check_data_matches
from camdistill.errors import UserError
from camdistill.networks.training_facts import TrainingFacts


def test_a_teacher_whose_classes_are_in_another_order_is_refused() -> None:
    facts = TrainingFacts(class_names=("ant", "bee", "cat"))
    check_data_matches(facts, (8, 8), ("ant", "bee", "cat"), "teacher")
    check_data_matches(facts, (8, 8), ("dog", "eel", "fox"), "teacher")  # of another data set
    with pytest.raises(UserError, match="class 1 is 'cat' in the data and 'bee' in the teacher"):
        check_data_matches(facts, (8, 8), ("ant", "cat", "bee"), "teacher")


def test_the_size_that_a_teacher_was_trained_at_is_told_where_the_data_has_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts = TrainingFacts(size=(64, 64))
    with caplog.at_level(logging.WARNING):
        check_data_matches(facts, (64, 64), (), "teacher")
        assert not caplog.records
        check_data_matches(facts, (32, 32), (), "teacher")
    assert "trained on images of 64x64 pixels, the data's have 32x32" in caplog.text
