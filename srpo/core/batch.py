"""`Rollout`, one sampled response; `Batch`, packed tensors; and `pack`, which turns the first into the second.

`pack` shifts labels by one token. No other code in the project shifts.
Shapes: N sequences, T packed rows, J reasoning steps, L tokens of a response, P tokens of a prompt, K ids kept by a top-k filter.
In the routing tables (`routed`, `routed_experts`) D is decoder layers and K the experts of a token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from srpo_kernels.segments import IGNORE, compact, scatter  # IGNORE: label of a position whose next token is not trained on

from srpo.core.errors import UserError, naming
from srpo.core.jsonl import json_lines


@dataclass(frozen=True)
class Rollout:
    """One sampled response, and one line of `rollouts.jsonl`."""

    example_id: str
    """Id of the pair (`Example.example_id`) that it answers."""
    group: int
    """Number of the prompt within the optimizer step; the responses to one prompt share it."""
    prompt_ids: tuple[int, ...]
    """[P] token ids of the prompt."""
    response_ids: tuple[int, ...]
    """[L] sampled token ids, the stop token included."""
    sampling_logprobs: tuple[float, ...]
    """[L] log-probability of each response token, in nats, under the sampled distribution: after temperature and top-k."""
    step_ends: tuple[int, ...]
    """[J] exclusive end of each step in response tokens: nondecreasing, the last one is L."""
    answers: tuple[str | None, ...]
    """[J] parsed answer of each step; None if the step is missing or its answer cannot be read."""
    text: str
    """The decoded response, without special tokens at its end."""
    finish: str
    """Why sampling ended: stop | length | abort."""
    policy_version: int
    """Number of the last weight sync before it was sampled."""
    step_rewards: tuple[float, ...] | None = None
    """[J] reward of each step (Eq. 5); None until it is scored."""
    reward_sources: tuple[str, ...] | None = None
    """[J] source of each reward: gold | judge | rule | skip, or missing | no_verdict for an ungraded step; None until scored."""
    verdicts: tuple[bool | float | None, ...] | None = None
    """[J] the judge's verdicts, also on steps that another source graded; None if the judge was not asked."""
    support: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[L, K] int32 ids that each token was drawn from, padded with -1; None if not requested. Not in `rollouts.jsonl`."""
    routed: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[P + L - 1, D, K] int16 experts of each input token (the last response token is no input), -1 if unknown; None if not
    requested. Not in `rollouts.jsonl`."""

    @classmethod
    def from_tokens(
        cls, prompt_ids: Sequence[int], response_ids: Sequence[int], step_ends: Sequence[int] | None = None
    ) -> Rollout:
        """Return a response that was not sampled, such as a demonstration, ready for `pack`: log-probabilities 0, no text.

        step_ends: [J]; if None, the response is a single step.
        """
        ends = (len(response_ids),) if step_ends is None else tuple(step_ends)
        no_logprobs, no_answers = (0.0,) * len(response_ids), (None,) * len(ends)
        return cls("", 0, tuple(prompt_ids), tuple(response_ids), no_logprobs, ends, no_answers, "", "stop", 0)

    @classmethod
    def from_answers(cls, example_id: str, answers: Sequence[str | None], *, text: str = "", group: int = 0) -> Rollout:
        """Return a response known by its answers [J] and text, without tokens: it can be scored, judged and evaluated."""
        return cls(example_id, group, (), (), (), (0,) * len(answers), tuple(answers), text, "stop", 0)

    def bare(self) -> Rollout:
        """This rollout without its token tables, which are large and not written to `rollouts.jsonl`."""
        return replace(self, support=None, routed=None)

    @property
    def step_lengths(self) -> tuple[int, ...]:
        """Number of response tokens in each step, [J]."""
        return tuple(b - a for a, b in zip((0, *self.step_ends[:-1]), self.step_ends, strict=True))


def write_rollouts(path: Path, rollouts: Iterable[Rollout], step: int) -> None:
    """Append rollouts to a JSON Lines file, one line each, with the optimizer step that used them; token tables are left out."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        for rollout in rollouts:
            row = {"step": step, **asdict(rollout.bare())}
            del row["support"], row["routed"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rollouts(path: Path) -> Iterator[tuple[int, Rollout]]:
    """Yield (optimizer step, rollout) for every line of a `rollouts.jsonl`. UserError with file and line for any other line, also
    for one that was cut off."""
    want = "a line of a rollouts.jsonl that srpo.train or srpo.evaluate wrote"
    for where, row in json_lines(path, f"{want}, or remove it if it was cut off", finite=False):
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        names = _ROLLOUT_KEYS.keys()
        if wrong := sorted(({*names} - _OPTIONAL - fields.keys()) | (fields.keys() - names)):
            raise UserError(f"{where}: {wrong[0]!r} is missing or unknown: give {want}")
        for key, value in fields.items():
            if not (_ROLLOUT_KEYS[key](value) or (value is None and key in _OPTIONAL)):
                raise UserError(f"{where}: {key} is {str(value)[:80]!r}: give {want}")
        step = fields.pop("step")
        rollout = Rollout(**fields)
        num_tokens, num_steps = len(rollout.response_ids), len(rollout.answers)
        per_step = [rollout.step_ends, rollout.step_rewards, rollout.reward_sources, rollout.verdicts]
        if (
            any(len(values) != num_steps for values in per_step if values is not None)
            or len(rollout.sampling_logprobs) != num_tokens
            or not num_steps
            or [*rollout.step_ends, num_tokens] != sorted([*rollout.step_ends, num_tokens])
        ):
            raise UserError(f"{where}: its lists of steps or tokens differ in length: give {want}")
        yield step, rollout


def _is_int(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return (type(value) is float and not math.isnan(value)) or (type(value) is int and abs(value) < 2**53)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all(check: Callable[[Any], bool], none: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a list of values that pass `check`, or null with `none`."""
    return lambda values: isinstance(values, tuple) and all(check(v) or (none and v is None) for v in values)


_OPTIONAL = {"step_rewards", "reward_sources", "verdicts"}
_ROLLOUT_KEYS: dict[str, Callable[[Any], bool]] = {
    "step": _is_int,
    "example_id": _is_text,
    "group": _is_int,
    "prompt_ids": _all(_is_int),
    "response_ids": _all(_is_int),
    "sampling_logprobs": _all(_is_number),
    "step_ends": _all(_is_int),
    "answers": _all(_is_text, none=True),
    "text": _is_text,
    "finish": lambda value: value in ("stop", "length", "abort"),
    "policy_version": lambda value: type(value) is int and -1 <= value < 2**31,  # -1: never synced
    "step_rewards": _all(_is_number),
    "reward_sources": _all(_is_text),
    "verdicts": _all(lambda value: isinstance(value, bool) or _is_number(value), none=True),
}


@dataclass(frozen=True)
class Batch:
    """Sequences packed end to end, without padding. Row t holds one input token and, in `labels`, the token it predicts.

    Log-probabilities, weights and kept ids of a token stand in the row that *predicts* it, so later code never shifts.
    """

    input_ids: torch.Tensor
    """[T] int64, the input token of each row."""
    labels: torch.Tensor
    """[T] int64, the next token if it is a response token, else IGNORE."""
    position_ids: torch.Tensor
    """[T] int64, position of the row in its sequence, from 0."""
    cu_seqlens: torch.Tensor
    """[N + 1] int32, first row of each sequence, then T."""
    step_ends: torch.Tensor
    """[N, J] int32, exclusive end of each step in rows of the sequence, prompt rows included. Rows after the last end belong to
    the last step."""
    step_advantages: torch.Tensor
    """[N, J] fp32, advantage of each step; the loss gives it to all tokens of the step."""
    weights: torch.Tensor
    """[T] fp32, weight of each row in the loss, with every denominator of Eq. 6 in it; 0 in rows without a label."""
    sampling_logprobs: torch.Tensor
    """[T] fp32, the engine's log-probability of each label, in nats, after temperature and top-k; 0 in rows without a label."""
    old_logprobs: torch.Tensor | None = None
    """[T] fp32, the trainer's log-probability of each label before the optimizer step's first update (pi_old); None if not
    computed."""
    ref_logprobs: torch.Tensor | None = None
    """[T] fp32, the reference policy's log-probability of each label; None if not computed."""
    kept_ids: torch.Tensor | None = None
    """[T, K] int64 ids that the top-k filter of the behaviour policy kept, padded with negative ids; None if unknown."""
    importance: torch.Tensor | None = None
    """[T] fp32 factor on `weights` (`srpo.training.mismatch.importance_weights`); None if not computed."""
    routed_experts: torch.Tensor | None = None
    """[T, D, K] int16 experts that the engine chose for each input token, -1 if unknown; None if not requested."""

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max()) if self.num_sequences else 0

    def to(self, device: torch.device) -> Batch:
        """Return the batch with all tensors on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def with_(self, **tensors: torch.Tensor | None) -> Batch:
        """Return the batch with the named fields replaced."""
        return replace(self, **tensors)

    def rows(self) -> tuple[torch.Tensor, Batch]:
        """Return (index [R] int64 of the labelled rows, the batch cut down to those rows).

        Only these rows go through the output head; prompt rows do not. `step_ends` and `cu_seqlens` of the cut batch count
        labelled rows.
        """
        keep = self.labels != IGNORE
        index = keep.nonzero()[:, 0]
        cu_seqlens, step_ends = compact(keep, self.cu_seqlens, self.step_ends)
        cut = {
            k: v[index]
            for k, v in vars(self).items()
            if isinstance(v, torch.Tensor) and k not in ("cu_seqlens", "step_ends", "step_advantages")
        }
        return index, replace(self, cu_seqlens=cu_seqlens, step_ends=step_ends, **cut)

    def scatter(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return [T, ...] with `values` [R, ...] in the rows `index` [R], the labelled ones (`rows`), and zeros in all others."""
        return scatter(values, index, len(self.labels))


def pack(
    rollouts: Sequence[Rollout],
    step_advantages: np.ndarray | torch.Tensor,
    sequence_weights: np.ndarray | torch.Tensor,
    max_tokens: int | None = None,
) -> list[Batch]:
    """Pack rollouts into micro-batches of at most `max_tokens` rows (None: one micro-batch), in the order given.

    Labels are shifted by one here and nowhere else. The last token of a sequence is never an input, so a sequence has
    len(prompt) + len(response) - 1 rows. step_advantages: [N, J]. sequence_weights: [N], the weight of each response token of
    the sequence (`srpo.algorithm.losses.sequence_weights`).
    Raises UserError for an empty prompt, and for a sequence of more than `max_tokens` rows.
    """
    step_advantages = torch.as_tensor(step_advantages, dtype=torch.float32)
    sequence_weights = torch.as_tensor(sequence_weights, dtype=torch.float32)
    batches: list[Batch] = []
    chunk: list[int] = []
    rows = 0
    for i, rollout in enumerate(rollouts):
        if not rollout.prompt_ids:
            raise UserError(f"rollout of {rollout.example_id} has an empty prompt: a prompt needs at least one token")
        num_rows = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
        if max_tokens is not None and num_rows > max_tokens:
            raise UserError(
                f"rollout of {rollout.example_id} has {num_rows} tokens, more than a micro-batch of {max_tokens}: "
                "raise train.micro_batch_tokens or lower rollout.max_new_tokens"
            )
        if chunk and max_tokens is not None and rows + num_rows > max_tokens:
            batches.append(_pack_chunk([rollouts[k] for k in chunk], step_advantages[chunk], sequence_weights[chunk]))
            chunk, rows = [], 0
        chunk.append(i)
        rows += num_rows
    if chunk:
        batches.append(_pack_chunk([rollouts[k] for k in chunk], step_advantages[chunk], sequence_weights[chunk]))
    return batches


def _pack_chunk(rollouts: list[Rollout], step_advantages: torch.Tensor, sequence_weights: torch.Tensor) -> Batch:
    input_ids, labels, position_ids, weights, sampling_logprobs, step_ends = [], [], [], [], [], []
    lengths = [0]
    supports: list[tuple[int, np.ndarray]] = []  # (first row, [L, K])
    routed: list[tuple[int, np.ndarray]] = []  # (first row, [P + L - 1, D, K])
    for rollout, weight in zip(rollouts, sequence_weights.tolist(), strict=True):
        tokens = (*rollout.prompt_ids, *rollout.response_ids)
        ignored = len(rollout.prompt_ids) - 1  # rows that predict prompt tokens
        num_response = len(rollout.response_ids)
        input_ids += tokens[:-1]
        labels += [IGNORE] * ignored + list(rollout.response_ids)
        position_ids += range(len(tokens) - 1)
        weights += [0.0] * ignored + [weight] * num_response
        if rollout.support is not None:
            supports.append((lengths[-1] + ignored, rollout.support))
        if rollout.routed is not None:
            routed.append((lengths[-1], rollout.routed))
        sampling_logprobs += [0.0] * ignored + list(rollout.sampling_logprobs)
        step_ends.append([ignored + end for end in rollout.step_ends])
        lengths.append(lengths[-1] + len(tokens) - 1)
    return Batch(
        kept_ids=_table(supports, len(input_ids), np.int64) if len(supports) == len(rollouts) else None,
        routed_experts=_table(routed, len(input_ids), np.int16) if routed else None,
        input_ids=torch.tensor(input_ids, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        position_ids=torch.tensor(position_ids, dtype=torch.long),
        cu_seqlens=torch.tensor(lengths, dtype=torch.int32),
        step_ends=torch.tensor(step_ends, dtype=torch.int32).reshape(len(rollouts), -1),
        step_advantages=step_advantages.contiguous(),
        weights=torch.tensor(weights, dtype=torch.float32),
        sampling_logprobs=torch.tensor(sampling_logprobs, dtype=torch.float32),
    )


def _table(parts: Sequence[tuple[int, np.ndarray]], num_rows: int, dtype: type[np.integer]) -> torch.Tensor:
    """Table [num_rows, ..., K] of (first row, ids [rows, ..., k]) parts with k <= K; -1 in all other places."""
    shape = parts[0][1].shape[1:-1]
    table = np.full((num_rows, *shape, max(ids.shape[-1] for _, ids in parts)), -1, dtype=dtype)
    for first, ids in parts:
        table[first : first + len(ids), ..., : ids.shape[-1]] = ids
    return torch.from_numpy(table)
