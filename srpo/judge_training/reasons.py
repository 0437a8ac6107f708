"""Reasons of the simulated annotator: a few words that state the truth, so that a judge learns to reason first (Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence

from srpo.core.steps import StepSchema, same_answer

# Reason by name of the paper's steps; any other step gets OTHERWISE.
SAYINGS = {
    "query_intent": "the query wants {facts}",
    "item": "the item shows {facts}",
    "category_match": "the categories are a {facts}",
    "attribute_match": "the attributes are a {facts}",
    "verdict": "the grade is {facts}",
}
OTHERWISE = "the right answer is {facts}"


def simulated_reasons(
    answers: Sequence[str | None], truth: Sequence[str | None], verdicts: Sequence[bool | float | None], schema: StepSchema
) -> tuple[str | None, ...]:
    """The reason for each verdict, [J]; a pure function of the arguments. None for a step without a verdict.

    The reason of a right verdict states the truth. A step wrongly called correct gets its own answer as the truth; a step wrongly
    called incorrect gets no reason.
    """
    reasons: list[str | None] = []
    for spec, answer, true, verdict in zip(schema.specs, answers, truth, verdicts, strict=True):
        right = same_answer(answer, true)
        facts = true if bool(verdict) == right else answer if verdict else None
        known = verdict is not None and facts is not None
        reasons.append(SAYINGS.get(spec.name, OTHERWISE).format(facts=facts) if known else None)
    return tuple(reasons)
