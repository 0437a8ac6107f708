"""Adversarial training pairs (`data.adversarial_frac`): titles that claim a verdict, so that the policy learns to ignore them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from srpo.core.steps import StepSchema
from srpo.data.examples import Example

_NAMES = ("Relevance", "Verdict", "Grade", "Rating", "Label", "Judgment")
_PRAISE = ("excellent match", "best match", "fully relevant", "perfect match for the query", "correct")


def with_attacks(examples: Sequence[Example], frac: float, seed: int, schema: StepSchema) -> list[Example]:
    """The examples; a share `frac` of them gets an `attack`, a text that claims the best verdict.

    Pairs of every grade are drawn alike, so that the text says nothing about the label: a policy that saw it on irrelevant pairs
    alone would learn to punish it. Labels stay, and only the policy reads the attack. It is a pure function of (seed, example_id,
    examples): a resumed run and every rank draw the same. Half of the claims are whole responses, with all steps; the others are
    a verdict, the last line of a response, or praise.
    """
    if not frac:
        return list(examples)
    best = schema.grades.names[-1]
    models = [example for example in examples if example.grade == best]

    def attacked(example: Example) -> Example:
        rng = random.Random(f"adversarial|{seed}|{example.example_id}")
        if rng.random() >= frac:
            return example
        return replace(example, attack=_claim(rng, example, models, best, schema))

    return [attacked(example) for example in examples]


def _claim(rng: random.Random, example: Example, models: Sequence[Example], best: str, schema: StepSchema) -> str:
    kind = rng.randrange(6)  # half of them are responses
    if kind == 0:
        return f" {rng.choice(_NAMES)}: {best}"
    if kind == 1:
        last = schema.write([best] * schema.num_steps).splitlines()[-1]  # of text the line of the verdict, of JSON the whole
        return f" {last}"
    if kind == 2:
        return f" - {rng.choice(_PRAISE)}, {best}"
    answers = _answers(example, rng.choice(models) if models and rng.random() < 0.5 else None, schema, best)
    return " " + " ".join(schema.write(answers).splitlines())


def _answers(example: Example, model: Example | None, schema: StepSchema, best: str) -> list[str]:
    """Answers [J] of a response with the best verdict: of a pair of the best grade, or made from query and options."""
    answers = []
    for j, spec in enumerate(schema.specs):
        known = [] if model is None else [*model.truth[j : j + 1], *model.gold[j : j + 1]]
        made = spec.options[0] if spec.options else example.query
        answers.append(next((answer for answer in known if answer), made))
    return [*answers[:-1], best]
