"""Probabilities of grades: against forwards of the plain model, on names that share tokens, and against greedy decoding."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from chat_families import family_tokenizer
from small_world import TINY, SmallWorld

from srpo.core.batch import Rollout
from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, StepsConfig
from srpo.data.prompts import PromptForm
from srpo.data.readers import load_examples
from srpo.data.tokenizer import encode, load_tokenizer
from srpo.experiments.start import PROMPT
from srpo.policy.grade_probs import grade_branches, grade_probs
from srpo.policy.model import Policy, load_policy, make_tiny
from srpo.rollout.local import LocalEngine
from srpo.training.evaluation import evaluate_policy

SCALES = [
    ("L1", "L2", "L3", "L4"),
    ("no", "yes"),
    ("not relevant", "not really relevant", "relevant", "relevant and exact"),
    ("0", "1", "10"),
]


def response(tokenizer: Any, text: str) -> Rollout:
    prompt = encode(tokenizer, "Query: red shoes\nItem: Acme Runner\n")
    return replace(Rollout.from_tokens(prompt, (*encode(tokenizer, text), tokenizer.eos_token_id)), text=text)


@pytest.mark.parametrize("names", SCALES)
@pytest.mark.parametrize("form", ["text", "json"])
def test_they_are_products_of_restricted_distributions(names: tuple[str, ...], form: str) -> None:
    tokenizer: Any = family_tokenizer("chatml")
    grades = Grades(names)
    schema = StepsConfig(form=form).schema(grades)  # type: ignore[arg-type]
    model = make_tiny(tokenizer, replace(TINY, max_context=512), random.randrange(1000))
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    texts = [schema.write(["shoes", "sneaker", "match", "unclear", random.choice(names)]) for _ in range(5)]
    rollouts = [response(tokenizer, text) for text in (*texts, "no steps at all")]
    probs = grade_probs(Policy(model), tokenizer, rollouts, schema, max_tokens=400)
    assert probs[-1] is None
    for rollout, row in zip(rollouts[:-1], probs[:-1], strict=True):
        prefix, branches = grade_branches(tokenizer, rollout, schema) or ((), [])
        own = schema.grades.names.index(schema.parse_text(rollout.text).answers[-1] or "")
        assert (*prefix, *branches[own]) == rollout.response_ids  # its own branch is the response itself, to its end
        assert len({*branches}) == len(names)
        expected = []
        for branch in branches:
            total = 0.0
            for k, token in enumerate(branch):
                rivals = sorted({other[k] for other in branches if other[:k] == branch[:k]})
                ids = torch.tensor([(*rollout.prompt_ids, *prefix, *branch[:k])])
                with torch.no_grad():
                    logits = plain(ids).logits[0, -1].double()[rivals]
                total += logits.log_softmax(0)[rivals.index(token)].item()
            expected.append(total)
        assert row == pytest.approx(torch.tensor(expected).exp().tolist(), abs=1e-5) and sum(row or ()) == pytest.approx(1)


def test_the_grade_that_greedy_decoding_took_is_the_likeliest(world: SmallWorld) -> None:
    tokenizer, model = load_tokenizer(world.policy), load_policy(world.policy)
    examples = load_examples(world.train, PAPER, 48)
    engine = LocalEngine(model)
    settings: dict[str, Any] = {"form": PromptForm(PROMPT), "max_new_tokens": 80, "batch_size": 48}
    _, rollouts = evaluate_policy(engine, tokenizer, PAPER, examples, **settings)
    probs = grade_probs(Policy(model), tokenizer, rollouts, PAPER)
    read = [(r, row) for r, row in zip(rollouts, probs, strict=True) if row is not None]
    assert len(read) > 30
    for rollout, row in read:
        assert PAPER.grades.names[row.index(max(row))] == rollout.answers[-1]
