"""srpo.rewards.scalar: probabilities turned into verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from plain_tokenizer import PlainTokenizer

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema, StepSpec
from srpo.data.examples import Example
from srpo.data.tokenizer import train_tokenizer
from srpo.rewards.scalar import ScalarCase, ScalarJudge, is_there, scalar_case

SCHEMA = StepSchema([StepSpec("a", "^a:"), StepSpec("b", "^b:"), StepSpec("c", "^c:")])
PAIR = Example("e", "q", "boots", "Boots")


class Chars(PlainTokenizer):
    all_special_ids = (0,)

    def encode(self, text: str, add_special_tokens: bool = True, **_: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [chr(i) for i in ids]


def rollout(text: str) -> Rollout:
    return Rollout.from_answers("e", SCHEMA.parse_text(text).answers, text=text)


class Scores:
    def __init__(self, *row: float) -> None:
        self.cases: list[ScalarCase] = []
        self.row = row or (0.2, 0.5, 0.9)

    def __call__(self, cases: Sequence[ScalarCase]) -> list[list[float]]:
        self.cases += cases
        return [list(self.row) for _ in cases]


def test_what_the_model_reads() -> None:
    prompt, ids, ends = scalar_case(PAIR, "  a: x\nb: yy\nc: z \n", Chars(), SCHEMA)
    assert "".join(map(chr, prompt)) == "Query: boots\nItem: Boots\nResponse:\n"
    assert "".join(map(chr, ids)) == "a: x\nb: yy\nc: z" and ends == (5, 11, 15)
    lacking = scalar_case(PAIR, "a: x\nc: z", Chars(), SCHEMA)
    assert [is_there(lacking, j) for j in range(3)] == [True, False, True]


def test_no_text_is_a_special_token() -> None:
    tokenizer: Any = train_tokenizer(["red boots"] * 9, 300)
    prompt, ids, _ = scalar_case(replace(PAIR, title="Boots<|end|>"), "a: x<|end|>\nb: y", tokenizer, SCHEMA)
    assert tokenizer.eos_token_id not in (*prompt, *ids)
    assert tokenizer.decode(prompt) == "Query: boots\nItem: Boots<|end|>\nResponse:\n" and "x<|end|>" in tokenizer.decode(ids)


@pytest.mark.parametrize(("graded", "verdicts"), [(False, (False, True, True)), (True, (0.2, 0.5, 0.9))])
def test_probabilities_become_verdicts_or_stay(graded: bool, verdicts: tuple[bool | float, ...]) -> None:
    scores = Scores()
    judge = ScalarJudge(scores, Chars(), SCHEMA, max_tokens=60, graded=graded)
    texts = ["a: x\nb: y\nc: z", "a: x\nc: z", "a: x\nb: y\nc: z", "a: " + "x" * 60 + "\nb: y\nc: z"]
    judged = judge.judge([rollout(text) for text in texts], [PAIR] * 4)
    assert judged[0] == judged[2] == verdicts
    assert judged[1] == (verdicts[0], 0.0 if graded else False, verdicts[2])  # a missing step is wrong
    assert judged[3] == (None,) * 3
    assert len(scores.cases) == 2  # equal cases are scored once, the too long one is not
    assert judge.judge([], []) == []


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1])
def test_a_score_that_is_no_probability_is_no_verdict(score: float) -> None:
    judge = ScalarJudge(Scores(0.2, score, 0.9), Chars(), SCHEMA, max_tokens=60)
    with pytest.raises(UserError, match=f"1 scores are no probabilities, first {score}"):
        judge.judge([rollout("a: x\nb: y\nc: z")], [PAIR])
