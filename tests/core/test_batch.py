"""srpo.core.batch: `pack` and `rows` compared with a slow construction token by token; rollouts.jsonl written and read back."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srpo.core.batch import IGNORE, Batch, Rollout, pack, read_rollouts, write_rollouts

# Multiples of 1/8: fp32 holds them exactly, so that tests can compare with ==.
exact = st.integers(-64, 64).map(lambda k: k / 8)
ids = st.integers(0, 99)


@st.composite
def rollouts_of(draw: Any, num_steps: int, min_response: int = 0) -> Rollout:
    prompt = draw(st.lists(ids, min_size=1, max_size=5))
    response = draw(st.lists(ids, min_size=min_response, max_size=8))
    cuts = sorted(draw(st.lists(st.integers(0, len(response)), min_size=num_steps - 1, max_size=num_steps - 1)))
    logprobs = draw(st.lists(exact, min_size=len(response), max_size=len(response)))
    answers = draw(st.lists(st.one_of(st.none(), st.text(max_size=5)), min_size=num_steps, max_size=num_steps))
    scored = draw(st.booleans())
    return Rollout(
        example_id=draw(st.text(max_size=4)),
        group=draw(st.integers(0, 5)),
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        sampling_logprobs=tuple(logprobs),
        step_ends=(*cuts, len(response)),
        answers=tuple(answers),
        text=draw(st.text(max_size=12)),
        finish=draw(st.sampled_from(["stop", "length", "abort"])),
        policy_version=draw(st.integers(0, 9)),
        step_rewards=tuple(draw(st.floats(0, 1)) for _ in range(num_steps)) if scored else None,
        reward_sources=("gold",) * num_steps if scored else None,
    )


@st.composite
def packings(draw: Any) -> tuple[list[Rollout], torch.Tensor, torch.Tensor, int | None]:
    num_steps = draw(st.integers(1, 4))
    rollouts = draw(st.lists(rollouts_of(num_steps), max_size=6))
    advantages = [[draw(exact) for _ in range(num_steps)] for _ in rollouts]
    weights = [draw(exact) for _ in rollouts]
    most = max((len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts), default=1)
    max_tokens = draw(st.one_of(st.none(), st.integers(max(most, 1), 2 * most + 2)))
    return rollouts, torch.tensor(advantages).reshape(len(rollouts), num_steps), torch.tensor(weights), max_tokens


def step_of(rollout: Rollout, token: int) -> int:
    return sum(end <= token for end in rollout.step_ends)


def step_of_row(batch: Batch, n: int, row: int) -> int:
    """Step of row `row` of sequence n, computed from `step_ends` as the docstring of Batch defines it."""
    ends = batch.step_ends[n].tolist()
    return min(sum(end <= row for end in ends), len(ends) - 1)


def sequences(batches: list[Batch]) -> list[tuple[Batch, int, int, int]]:
    """(batch, n, first row, last row + 1) of every sequence, in order."""
    rows = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        rows += [(batch, n, a, b) for n, (a, b) in enumerate(itertools.pairwise(bounds))]
    return rows


@settings(max_examples=150, deadline=None)
@given(packings())
def test_every_row_predicts_the_token_it_should(packing: tuple[list[Rollout], torch.Tensor, torch.Tensor, int | None]) -> None:
    rollouts, advantages, weights, max_tokens = packing
    batches = pack(rollouts, advantages, weights, max_tokens)
    packed = sequences(batches)
    assert len(packed) == len(rollouts)  # in the order given
    for i, (rollout, (batch, n, start, end)) in enumerate(zip(rollouts, packed, strict=True)):
        tokens = rollout.prompt_ids + rollout.response_ids
        assert end - start == len(tokens) - 1
        assert torch.equal(batch.step_advantages[n], advantages[i])
        for row in range(len(tokens) - 1):
            t, predicted = start + row, row + 1 - len(rollout.prompt_ids)  # which response token the row predicts, if >= 0
            assert batch.input_ids[t] == tokens[row]
            assert batch.position_ids[t] == row
            if predicted < 0:
                assert (batch.labels[t], batch.weights[t], batch.sampling_logprobs[t]) == (IGNORE, 0, 0)
            else:
                assert batch.labels[t] == tokens[row + 1]
                assert batch.weights[t] == weights[i]
                assert batch.sampling_logprobs[t] == rollout.sampling_logprobs[predicted]
                assert step_of_row(batch, n, row) == step_of(rollout, predicted)


@settings(max_examples=100, deadline=None)
@given(packings())
def test_micro_batches_are_full_and_well_formed(packing: tuple[list[Rollout], torch.Tensor, torch.Tensor, int | None]) -> None:
    rollouts, advantages, weights, max_tokens = packing
    batches = pack(rollouts, advantages, weights, max_tokens)
    if max_tokens is None:
        assert len(batches) == bool(rollouts)
    for batch in batches:
        rows = batch.input_ids.numel()
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == rows
        assert batch.num_sequences == batch.step_ends.shape[0] == batch.step_advantages.shape[0] >= 1
        assert batch.max_seqlen == max(b - a for _, _, a, b in sequences([batch]))
        assert max_tokens is None or rows <= max_tokens
        assert {getattr(batch, k).numel() for k in ("labels", "position_ids", "weights", "sampling_logprobs")} == {rows}
        assert batch.labels.dtype == batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
        assert batch.cu_seqlens.dtype == batch.step_ends.dtype == torch.int32
        assert batch.step_advantages.dtype == batch.weights.dtype == batch.sampling_logprobs.dtype == torch.float32
    for before, after in itertools.pairwise(batches):  # a batch ends only where the next sequence does not fit
        assert max_tokens is not None
        assert before.input_ids.numel() + int(after.cu_seqlens[1]) > max_tokens


@settings(max_examples=150, deadline=None)
@given(packings(), st.booleans())
def test_rows_keeps_the_labelled_rows_and_their_steps(
    packing: tuple[list[Rollout], torch.Tensor, torch.Tensor, int | None], extras: bool
) -> None:
    rollouts, advantages, weights, max_tokens = packing
    for batch in pack(rollouts, advantages, weights, max_tokens):
        size = batch.input_ids.numel()
        if extras:
            kept_ids = torch.arange(size * 3).reshape(size, 3)
            batch = batch.with_(
                old_logprobs=torch.arange(size).float(), ref_logprobs=-torch.arange(size).float(), kept_ids=kept_ids
            )
        index, cut = batch.rows()
        assert index.tolist() == [t for t in range(size) if batch.labels[t] != IGNORE]
        for name in (
            "input_ids",
            "labels",
            "position_ids",
            "weights",
            "sampling_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "kept_ids",
        ):
            full, part = getattr(batch, name), getattr(cut, name)
            assert (
                (part is None)
                if full is None
                else torch.equal(part, torch.stack([full[t] for t in index]) if len(index) else full[:0])
            )
        assert torch.equal(cut.step_advantages, batch.step_advantages)
        assert cut.step_ends.dtype == cut.cu_seqlens.dtype == torch.int32
        full_steps = {
            start + row: (n, step_of_row(batch, n, row)) for _, n, start, end in sequences([batch]) for row in range(end - start)
        }
        cut_steps = {
            start + row: (n, step_of_row(cut, n, row)) for _, n, start, end in sequences([cut]) for row in range(end - start)
        }
        assert [cut_steps[k] for k in range(len(index))] == [full_steps[t] for t in index.tolist()]
        for _, n, start, end in sequences([cut]):
            assert cut.step_ends[n].tolist() == sorted(cut.step_ends[n].tolist()) and cut.step_ends[n, -1] == end - start


def test_a_batch_by_hand() -> None:
    rollout = Rollout("a", 0, (7, 8), (1, 2, 3), (-0.5, -1.0, -1.5), (1, 1, 3), ("x", None, "y"), "", "stop", 0)
    (batch,) = pack([rollout], torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0.25]))
    assert batch.input_ids.tolist() == [7, 8, 1, 2]
    assert batch.labels.tolist() == [IGNORE, 1, 2, 3]
    assert batch.weights.tolist() == [0, 0.25, 0.25, 0.25]
    assert batch.sampling_logprobs.tolist() == [0, -0.5, -1.0, -1.5]
    assert batch.step_ends.tolist() == [[2, 2, 4]]
    assert rollout.step_lengths == (1, 0, 2)
    index, cut = batch.rows()
    assert index.tolist() == [1, 2, 3] and cut.step_ends.tolist() == [[1, 1, 3]] and cut.cu_seqlens.tolist() == [0, 3]


def test_scatter_undoes_rows() -> None:
    rollouts = [Rollout.from_tokens((7, 8), (1, 2, 3)), Rollout.from_tokens((7, 8, 9), ()), Rollout.from_tokens((9,), (4, 5))]
    (batch,) = pack(rollouts, torch.zeros(3, 1), torch.tensor([0.5, 1.0, 0.25]))
    index, cut = batch.rows()
    assert torch.equal(batch.scatter(cut.weights, index), batch.weights)
    ids = torch.arange(2 * len(index)).reshape(-1, 2)
    table = batch.scatter(ids, index)
    assert table.shape == (len(batch.labels), 2) and table.dtype == torch.int64
    assert torch.equal(table[index], ids) and not table[batch.labels == IGNORE].any()


def test_rollouts_that_were_not_sampled() -> None:
    demonstration = Rollout.from_tokens([7, 8], [1, 2, 3])
    assert demonstration.step_ends == (3,) and demonstration.answers == (None,)
    assert demonstration == Rollout("", 0, (7, 8), (1, 2, 3), (0.0,) * 3, (3,), (None,), "", "stop", 0)
    assert Rollout.from_tokens((7, 8), (1, 2, 3), (1, 1, 3)).step_lengths == (1, 0, 2)
    answered = Rollout.from_answers("a", ("x", None), text="1. x", group=4)
    assert answered == Rollout("a", 4, (), (), (), (0, 0), ("x", None), "1. x", "stop", 0)


def test_what_cannot_be_packed_is_refused() -> None:
    rollout = replace(Rollout.from_tokens((7, 8), (1, 2, 3)), example_id="pair-7")
    with pytest.raises(ValueError, match="pair-7 has an empty prompt"):
        pack([replace(rollout, prompt_ids=())], torch.zeros(1, 1), torch.ones(1))
    with pytest.raises(ValueError, match="pair-7 has 4 tokens, more than a micro-batch of 3"):
        pack([rollout], torch.zeros(1, 1), torch.ones(1), max_tokens=3)
    assert pack([rollout], torch.zeros(1, 1), torch.ones(1), max_tokens=4)
    assert pack([], torch.zeros(0, 1), torch.ones(0)) == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(rollouts_of(3), st.integers(0, 9)), max_size=4), st.floats(allow_nan=False))
def test_rollouts_survive_the_file(tmp_path: Path, written: list[tuple[Rollout, int]], logprob: float) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.unlink(missing_ok=True)
    path.touch()
    written = [(replace(r, sampling_logprobs=(logprob,) * len(r.response_ids)), step) for r, step in written]
    for rollout, step in written:
        write_rollouts(path, [rollout], step)
    assert list(read_rollouts(path)) == [(step, rollout) for rollout, step in written]
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    names = {"step"} | {f.name for f in fields(Rollout)} - {"support", "routed"}  # token tables are not written
    assert all(set(line) == names for line in lines)


def test_several_rollouts_of_a_step_are_written_together(tmp_path: Path) -> None:
    rollout = Rollout("a\u2028\n", 0, (7,), (1,), (-math.pi,), (1,), (None,), "\u767b \r\n", "stop", 0, (0.2,), ("judge",))
    write_rollouts(tmp_path / "r.jsonl", [rollout, replace(rollout, group=1)], 5)
    write_rollouts(tmp_path / "r.jsonl", [], 6)
    assert list(read_rollouts(tmp_path / "r.jsonl")) == [(5, rollout), (5, replace(rollout, group=1))]
