"""Probabilities of the grades: how sure the policy is of its verdict, for ranking and for metrics of ranking.

A response with each grade in place of its verdict is a branch of a tree of tokens. At each fork the policy's distribution,
restricted to the branches, is read off one forward; a grade's probability is the product along its branch, up to where no other
grade is left. Most scales have a single fork, so a response costs one forward of its prompt and text.

Letters: N responses, C grades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from srpo.core.batch import Rollout, pack
from srpo.core.steps import StepSchema, without_stops
from srpo.core.token_spans import decode_with_ends
from srpo.data.chat import end_id
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.tokenizer import encode
from srpo.policy.model import Policy

Ids = tuple[int, ...]


def grade_probs(
    policy: Policy, tokenizer: Any, rollouts: Sequence[Rollout], schema: StepSchema, max_tokens: int = 4096
) -> list[tuple[float, ...] | None]:
    """[N] probabilities [C] of the grades, from the worst, that add up to 1; None for a response without a readable verdict.

    max_tokens: most tokens in one forward. The policy's parameters are read as they are, without temperature or filter.
    """
    branches = [grade_branches(tokenizer, rollout, schema) for rollout in rollouts]
    forks = [(i, *fork) for i, found in enumerate(branches) if found is not None for fork in _forks(*found)]
    contexts = [(rollouts[i].prompt_ids + context, children) for i, context, children in forks]
    logprobs = _child_logprobs(policy, contexts, max_tokens)
    known = {fork[:2]: dict(zip(fork[2], row, strict=True)) for fork, row in zip(forks, logprobs, strict=True)}

    def logprob(i: int, prefix: Ids, grade: Ids) -> float:
        at_forks = ((known[i, prefix + grade[:k]], token) for k, token in enumerate(grade) if (i, prefix + grade[:k]) in known)
        return sum(children[token] for children, token in at_forks)

    return [
        None if found is None else tuple(math.exp(logprob(i, found[0], grade)) for grade in found[1])
        for i, found in enumerate(branches)
    ]


def grade_branches(tokenizer: Any, rollout: Rollout, schema: StepSchema) -> tuple[Ids, list[Ids]] | None:
    """(tokens before the first that depends on the grade, the tokens [C] that follow with each grade) of a response; None
    without a verdict.

    Each branch is the response with that grade in place of its verdict, to the end of its text and with `end_id`, so that
    "Exact" is no part of "Exactly". The text is encoded as a response of SFT is; that of the response's own grade is the response
    itself, unless it was sampled in other tokens.
    """
    own = without_stops(tokenizer, rollout.response_ids, stop_ids(tokenizer))
    text, _ = decode_with_ends(tokenizer, own)
    parsed = schema.parse_text(text)
    span = parsed.answer_spans[-1]
    if span is None or parsed.answers[-1] not in schema.grades.names:
        return None
    wholes = [(*encode(tokenizer, text[: span[0]] + name + text[span[1] :]), end_id(tokenizer)) for name in schema.grades.names]
    common = next(k for k, tokens in enumerate(zip_longest(*wholes)) if len({*tokens}) > 1)
    return wholes[0][:common], [whole[common:] for whole in wholes]


def _forks(prefix: Ids, grades: Sequence[Ids]) -> list[tuple[Ids, Ids]]:
    """(tokens so far, the different tokens that follow) of each fork of the tree of the grades."""
    children: dict[Ids, dict[int, None]] = {}
    for ids in grades:
        for k, token in enumerate(ids):
            children.setdefault(ids[:k], {})[token] = None
    return [(prefix + path, tuple(tokens)) for path, tokens in children.items() if len(tokens) > 1]


@torch.no_grad()
def _child_logprobs(policy: Policy, contexts: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[list[float]]:
    """Log-probabilities of the tokens that may follow each context, among these tokens."""
    rows = [Rollout.from_tokens(context, children[:1]) for context, children in contexts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids))
    longest = max((len(row.prompt_ids) for row in rows), default=0)
    no_loss = torch.zeros(len(rows), 1)
    batches = pack([rows[i] for i in order], no_loss, no_loss[:, 0], max(longest, max_tokens)) if rows else []
    device = next(policy.parameters()).device
    logits = (row for batch in batches for row in policy(batch.to(device)))  # one row per context
    found = {i: row[list(contexts[i][1])].double().log_softmax(0).tolist() for i, row in zip(order, logits, strict=True)}
    return [found[i] for i in range(len(rows))]
