"""Reasons of the simulated annotator."""

from __future__ import annotations

from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema, StepSpec
from srpo.judge_training.reasons import simulated_reasons

TRUTH = ("shoes sneakers; color not red", "shoes boots", "related", None, "L2")


def test_reasons_state_the_truth() -> None:
    answers = ("shoes sneakers; color red", "shoes boots", None, "match", "L2")
    assert simulated_reasons(answers, TRUTH, (False, True, False, None, True), PAPER) == (
        "the query wants shoes sneakers; color not red",
        "the item shows shoes boots",
        "the categories are a related",
        None,
        "the grade is L2",
    )


def test_an_annotator_who_errs_believes_what_it_says() -> None:
    schema = PAPER
    answers = ("shoes sneakers; color red", "shoes boots", "match", "match", "L2")
    passed, rejected, *_ = simulated_reasons(answers, TRUTH, (True, False, None, None, None), schema)
    assert (passed, rejected) == ("the query wants shoes sneakers; color red", None)


def test_steps_of_another_schema() -> None:
    schema = StepSchema([StepSpec("evidence", "^evidence:")])
    assert simulated_reasons(("a",), ("b",), (False,), schema) == ("the right answer is b",)
