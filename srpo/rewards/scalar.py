"""The scalar reward model as a judge (Appendix A): one probability per step, used as a verdict or as a graded reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema, parse_response
from srpo.data.examples import Example
from srpo.data.prompts import prompt_parts
from srpo.data.tokenizer import encode, encode_prompt
from srpo.rewards.judge import Verdicts
from srpo.rewards.verdicts import PROMPT

ScalarCase = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # ids of the prompt and of the response, step ends [J]


class Scorer(Protocol):
    """Computes probabilities of steps (`srpo.rewards.build.open_scalar_judge` makes one from a model)."""

    def __call__(self, cases: Sequence[ScalarCase]) -> Sequence[Sequence[float]]:
        """Return [N][J], the probability that each step is correct."""
        ...


def scalar_case(example: Example, response: str, tokenizer: Any, schema: StepSchema) -> ScalarCase:
    """Return the model's input for one response: ids of the prompt (`verdicts.PROMPT`) and of the response, and its step ends."""
    prompt = encode_prompt(tokenizer, prompt_parts(example, PROMPT))
    ids = encode(tokenizer, response.strip())
    return prompt, ids, parse_response(schema, tokenizer, ids).step_ends


def is_there(case: ScalarCase, j: int) -> bool:
    """Whether step j has a token at which it can be scored."""
    return case[2][j] > (case[2][j - 1] if j else 0)


class ScalarJudge:
    """Verdicts of a scalar reward model: p >= 0.5, or with `graded` the probability p itself, a fraction of the reward in Eq. 5.

    A step that the response lacks is wrong (p = 0). A case of more than `max_tokens` tokens gets no verdicts. Equal cases are
    scored once.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, schema: StepSchema, *, max_tokens: int, graded: bool = False) -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.schema = schema
        self.max_tokens = max_tokens
        self.graded = graded

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Return verdicts [N][J]; all None for a case that is too long."""
        probabilities = self.probabilities(rollouts, examples)
        return [tuple(p if p is None or self.graded else p >= 0.5 for p in row) for row in probabilities]

    def probabilities(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[tuple[float | None, ...]]:
        """Return [N][J], the probability that each step is correct; None for a case that is too long.

        Raises UserError if the model gives what is no probability, such as NaN.
        """
        cases = [scalar_case(e, r.text, self.tokenizer, self.schema) for r, e in zip(rollouts, examples, strict=True)]
        fitting = [case for case in dict.fromkeys(cases) if len(case[0]) + len(case[1]) <= self.max_tokens]
        scored = dict(zip(fitting, self.scorer(fitting), strict=True)) if fitting else {}
        if wrong := [p for row in scored.values() for p in row if not 0 <= p <= 1]:
            raise UserError(
                f"the scalar judge: {len(wrong)} scores are no probabilities, first {float(wrong[0])}: give another judge"
            )
        missing = (None,) * self.schema.num_steps
        return [
            tuple(float(p) if is_there(case, j) else 0.0 for j, p in enumerate(scored[case])) if case in scored else missing
            for case in cases
        ]
