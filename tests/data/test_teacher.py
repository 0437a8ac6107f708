"""The imperfect teacher errs at the given rates, and its later steps follow from its earlier ones."""

from __future__ import annotations

import secrets

import pytest

from srpo.core.config.demo import TeacherBias
from srpo.core.step_presets import PAPER
from srpo.data.catalogue import ATTRIBUTES, CATALOGUE
from srpo.data.examples import Example
from srpo.data.teacher import teach
from srpo.data.world import Facts, World

NO_BIAS = TeacherBias(0.0, 0.0, 0.0, 0.0, 0.0)
SCHEMA = PAPER


def examples(num: int) -> list[Example]:
    return list(World(secrets.randbelow(10_000)).examples("train", num))


def test_without_bias_every_step_is_right():
    for example in examples(300):
        parsed = SCHEMA.parse_text(teach(example, NO_BIAS))
        assert parsed.answers == example.truth
        assert not parsed.problems


@pytest.mark.parametrize(
    ("field", "step"), [("misread_negation", 0), ("mistake_mention", 1), ("related_as_match", 2), ("verdict_off_by_one", 4)]
)
def test_each_mistake_happens_in_its_step_at_its_rate(field, step):
    bias = TeacherBias(**{**vars(NO_BIAS), field: 0.5})
    affected = {
        "misread_negation": lambda e: " not " in e.truth[0].replace("brand not", ""),
        "mistake_mention": lambda e: "goes with" in e.title,
        "related_as_match": lambda e: e.gold[2] == "related",
        "verdict_off_by_one": lambda e: True,
    }[field]
    chosen = [e for e in examples(3000) if affected(e)]
    wrong = [SCHEMA.parse_text(teach(e, bias)).answers[step] != e.truth[step] for e in chosen]
    assert abs(sum(wrong) / len(wrong) - 0.5) < 5 * 0.5 / len(wrong) ** 0.5


def test_words_that_are_not_known_are_each_taken_for_one_other_thing():
    bias = TeacherBias(**{**vars(NO_BIAS), "misread_word": 0.5})
    read: dict[str, set[str]] = {}
    counts = {True: [0, 0], False: [0, 0]}  # whether the query has such a word: right, wrong
    for example in examples(3000):
        truth, answer = (
            Facts.parse(str(text)) for text in (example.truth[0], SCHEMA.parse_text(teach(example, bias)).answers[0])
        )
        unknown = [ATTRIBUTES[c.kind][c.value][-1] for c in truth.constraints if c.kind != "brand"]
        unknown = [word for word in (*unknown, CATALOGUE.leaf[truth.leaf].surfaces[-1]) if f" {word} " in f" {example.query} "]
        counts[bool(unknown)][truth != answer] += 1
        for before, after in zip(truth.constraints, answer.constraints, strict=True):
            if before != after:
                read.setdefault(str(before), set()).add(str(after))
        if truth.category != answer.category:
            assert truth.group == answer.group
            read.setdefault(truth.category, set()).add(answer.category)
    assert len(read) > 60 and all(len(others) == 1 for others in read.values())
    assert counts[False][1] == 0 and counts[True][1] > counts[True][0] / 2


def test_overlooking_turns_unclear_into_match():
    chosen = [e for e in examples(400) if e.gold[3] == "unclear"]
    bias = TeacherBias(0.0, 0.0, 0.0, 1.0, 0.0)
    assert {SCHEMA.parse_text(teach(e, bias)).answers[3] for e in chosen} == {"match"}


def test_teaching_is_a_pure_function():
    example = examples(1)[0]
    assert teach(example, TeacherBias(), 3) == teach(example, TeacherBias(), 3)


def test_a_pair_without_truth_is_refused():
    with pytest.raises(ValueError, match="catalogue world"):
        teach(Example("a", "q", "query", "title"), NO_BIAS)
