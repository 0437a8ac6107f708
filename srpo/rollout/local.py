"""The `local` engine: batched decoding in this process, on the CPU or on one GPU. A prompt is computed once for its group."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from srpo.core.errors import UserError
from srpo.policy.adapters import has_adapter, iter_merged_params
from srpo.policy.bf16_copies import has_bf16_copies
from srpo.policy.decode import Decoder, KeyValues
from srpo.policy.parallel import named_stored, unwrap
from srpo.policy.probe import check_family
from srpo.policy.routing import Routing
from srpo.rollout.engine import Groups, Sample, SamplingParams, check_prompts, in_order
from srpo.rollout.sampling import choose

_COMPACT_BELOW = 0.75  # compact a wave if its cost falls below this fraction
_CHUNK_COST = 0.5  # attention cost of one more chunk, in slots


class LocalEngine:
    """Decodes waves of at most `max_rows` responses with its own copy of the model's weights.

    model: a transformers causal LM or a `Policy`, not yet sharded. It is copied: to `device`, and its parameters to `dtype`, if
    given. If its parameters are on the meta device, the engine cannot sample before the first sync. Raises UserError for a kind
    of model that it does not decode right (`srpo.policy.probe`).
    max_context: longest prompt plus response in tokens; 0: the model's own limit. `policy_version` is -1 until the first sync.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_context: int = 0,
        max_rows: int = 256,
    ) -> None:
        if has_bf16_copies(model) or any(isinstance(param, DTensor) for param in model.parameters()):
            raise UserError(
                "the local engine cannot copy a sharded model: create it before the policy is sharded, then call sync_weights"
            )
        check_family(unwrap(model).config, engine=True)
        assert not has_adapter(model), "an engine has merged weights: create it before the adapter, then call sync_weights"
        # Each parameter is copied straight to its final dtype and device. Buffers keep their precision: rotary frequencies do
        # not survive bfloat16.
        copied = {id(param): _copy(param, device, dtype) for param in model.parameters()}
        own = copy.deepcopy(unwrap(model), copied)
        nn.Module.to(own, device)
        self._has_weights = not any(param.is_meta for param in model.parameters())
        self._decoder = Decoder(own)
        self.max_context = min(max_context or self._decoder.max_context, self._decoder.max_context)
        self.max_rows = max_rows
        self.policy_version = -1
        self._stats = {"num_tokens": 0.0, "generate_s": 0.0, "tokens_per_s": 0.0, "sync_s": 0.0}

    @property
    def model(self) -> nn.Module:
        """The engine's own copy."""
        return self._decoder.model

    def generate(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> list[Sample]:
        """See `Engine.generate`."""
        return in_order(self.stream(prompts, params, seed, numbers))

    def stream(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> Groups:
        """See `Engine.stream`. Groups come wave by wave, shortest prompts first; closed early, it stops between two waves.
        Each (prompt number, sample, position) has its own random number, whichever other prompts are in the wave.

        Also raises UserError if the policy's logits are not finite, if `params.support` is set and top_k filters nothing, or if
        `params.routing` is set and the model has no experts.
        """
        assert self._has_weights, "made from a model without weights: sync_weights comes first"
        check_prompts(prompts, params, self.max_context)
        vocab_size: int = unwrap(self.model).config.vocab_size
        if params.support and params.top_k >= vocab_size:
            raise UserError(
                f"rollout.support is 'replay' and rollout.top_k {params.top_k} keeps the whole vocabulary of "
                f"{vocab_size}: lower rollout.top_k, or set rollout.support to 'recompute'"
            )
        if params.routing:
            self._decoder.open_routers()
        return self._groups(prompts, params, seed, range(len(prompts)) if numbers is None else numbers)

    def _groups(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int]) -> Groups:
        if not prompts:
            return
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        shape = (max(numbers) + 1, params.group_size, params.max_new_tokens)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)[list(numbers)]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        per_wave = max(1, self.max_rows // params.group_size)
        num_tokens, seconds = 0, 0.0
        for first in range(0, len(prompts), per_wave):
            wave = by_length[first : first + per_wave]
            with torch.inference_mode():
                rows = self._wave([prompts[i] for i in wave], params, uniforms[wave].flatten(0, 1).to(self._decoder.device))
            num_tokens += sum(len(row[0]) for row in rows)
            seconds += time.perf_counter() - start
            self._stats |= {"num_tokens": float(num_tokens), "generate_s": seconds, "tokens_per_s": num_tokens / seconds}
            for place, i in enumerate(wave):
                group = rows[place * params.group_size : (place + 1) * params.group_size]
                yield i, [Sample(i, *row[:3], self.policy_version, *row[3:]) for row in group]
            start = time.perf_counter()  # the consumer's time between two waves does not count

    def _wave(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, uniforms: torch.Tensor
    ) -> list[tuple[tuple[int, ...], tuple[float, ...], str, np.ndarray | None, np.ndarray | None]]:
        """(response ids, log-probabilities, finish, support, routed) of each row, prompt-major. uniforms: [rows, tokens]."""
        num_rows, capacity = uniforms.shape
        device = self._decoder.device
        check_every = 1 if device.type == "cpu" else 8  # reading from a GPU whether rows have finished stalls it
        stop_ids = torch.tensor(() if params.ignore_eos else params.stop_ids, dtype=torch.long, device=device)
        # One row more than there are responses: filler slots of a chunk write there.
        ids = torch.zeros(num_rows + 1, capacity, dtype=torch.long, device=device)
        logprobs = torch.zeros(num_rows + 1, capacity, device=device)
        kept_shape = (num_rows + 1, capacity if params.support else 0, params.top_k)
        support = torch.zeros(kept_shape, dtype=torch.int32, device=device)
        stopped_at = torch.full((num_rows + 1,), capacity + 1, device=device)
        uniforms = torch.cat((uniforms, uniforms[:1]))
        rows = torch.arange(num_rows, device=device)  # row that each slot decodes
        alive = torch.ones(num_rows, dtype=torch.bool, device=device)  # whether each slot's response goes on
        num_alive = num_rows

        routes = _Routes(self._decoder.open_routers().num_layers, num_rows + 1, capacity) if params.routing else None
        routing = None if routes is None else Routing(keep_own=True)
        logits, key_values = self._decoder.prefill(prompts, params.group_size, capacity, routing)
        if routes is not None and routing is not None:
            routes.put_prompts(routing, len(prompts))
        for t in range(capacity):
            tokens, chosen, kept_ids = choose(
                logits, uniforms[rows, t], temperature=params.temperature, top_k=params.top_k, greedy=params.greedy
            )
            ids[rows, t] = tokens
            logprobs[rows, t] = chosen
            if params.support and kept_ids is not None:
                support[rows, t] = kept_ids.int()
            if stop_ids.numel():
                hit = alive & (tokens[:, None] == stop_ids).any(-1)
                stopped_at[rows] = torch.where(hit, t + 1, stopped_at[rows])
                alive &= ~hit
                if (t + 1) % check_every == 0 and int(alive.sum()) < num_alive:
                    num_alive = int(alive.sum())
                    keep = plan_compaction(alive.view(-1, key_values.group_size).tolist())
                    if keep is not None:
                        if not keep[0]:
                            break
                        rows, alive, tokens = _compact(key_values, keep, rows, alive, tokens, num_rows)
            if t + 1 < capacity:
                logits = self._decoder.step(tokens, key_values, routing)
                if routes is not None and routing is not None:
                    routes.put(routing, rows, t)

        if not bool(logprobs[:num_rows].isfinite().all()):
            raise UserError(
                "the policy computes logits that are not finite: check the checkpoint in policy.path, or start the same run with "
                "a lower optimizer.lr (it goes on from an earlier checkpoint if you remove the newest, if it has any)"
            )
        lengths = stopped_at.clamp(max=capacity).tolist()
        out_ids, out_logprobs, stops = ids.tolist(), logprobs.tolist(), (stopped_at <= capacity).tolist()
        kept = support.cpu().numpy() if params.support else None
        return [
            (
                tuple(out_ids[r][:n]),
                tuple(out_logprobs[r][:n]),
                "stop" if stops[r] else "length",
                None if kept is None else kept[r, :n].copy(),
                None if routes is None else routes.of(r, n, r // params.group_size, len(prompts[r // params.group_size])),
            )
            for r, n in enumerate(lengths[:num_rows])
        ]

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """See `Engine.sync_weights`. Copies parameters and persistent buffers by name and verifies each by checksum."""
        start = time.perf_counter()
        own = dict(named_stored(self.model))
        sums: dict[str, int] = {}
        with torch.no_grad():
            for name, tensor in iter_merged_params(policy):
                if name not in own or own[name].shape != tensor.shape:
                    shape = tuple(own[name].shape) if name in own else "no such parameter"
                    raise UserError(
                        f"policy parameter {name} {tuple(tensor.shape)} does not fit the engine's model ({shape}): "
                        "start the engine from the policy's own checkpoint"
                    )
                own[name].copy_(tensor)
                sums[name] = _checksum(tensor.to(own[name]))
            differing = [name for name, param in own.items() if sums.get(name) != _checksum(param)]
        if differing:
            raise UserError(
                f"after the weight sync {len(differing)} parameters differ from the policy's, first {differing[0]}: "
                "start the engine from the policy's own checkpoint"
            )
        self.policy_version, self._has_weights = version, True
        self._stats["sync_s"] = time.perf_counter() - start

    def sleep(self) -> None:
        """Does nothing: the engine keeps its weights, and the key-value store exists only while it samples."""

    def stats(self) -> dict[str, float]:
        return dict(self._stats)

    def close(self) -> None:
        """Drop the weights."""
        del self._decoder


class _Routes:
    """Experts of the tokens of one wave: one table per prompt, one per response."""

    def __init__(self, num_layers: int, num_rows: int, capacity: int) -> None:
        self._num_layers, self._shape = num_layers, (num_rows, capacity)
        self._prompts = self._responses = torch.zeros(0)

    def put_prompts(self, routing: Routing, num_prompts: int) -> None:
        """Store the routing of the prefill, whose prompts are padded to one length."""
        table = routing.table(self._num_layers)
        self._prompts = table.view(num_prompts, -1, *table.shape[1:]).cpu()
        self._responses = table.new_zeros(*self._shape, *table.shape[1:])

    def put(self, routing: Routing, rows: torch.Tensor, t: int) -> None:
        """Store the routing of token t of the responses `rows`."""
        self._responses[rows, t] = routing.table(self._num_layers)

    def of(self, row: int, length: int, prompt: int, prompt_length: int) -> np.ndarray:
        """`Sample.routed` of one response: its prompt's tokens, then its `length` tokens except the last."""
        return torch.cat((self._prompts[prompt, :prompt_length], self._responses[row, : length - 1].cpu())).numpy()


def plan_compaction(alive: list[list[bool]]) -> tuple[list[int], list[list[int]]] | None:
    """How to drop finished rows from a wave: (old chunk of each new chunk, old slots of each new chunk with -1 as filler).

    Empty lists if no row is alive, None if compaction does not pay off. alive: [chunks][rows]. Rows of one chunk share their
    prompt, so a new chunk takes its rows from one old chunk. The new chunk size is the divisor of the old one that costs least.
    """
    size = len(alive[0])
    slots = [[c * size + r for r, lives in enumerate(chunk) if lives] for c, chunk in enumerate(alive)]
    if not any(slots):
        return [], []
    divisors = [g for g in range(1, size + 1) if size % g == 0]
    num_chunks = {g: sum(math.ceil(len(s) / g) for s in slots) for g in divisors}
    best = min(divisors, key=lambda g: num_chunks[g] * (g + _CHUNK_COST))
    if num_chunks[best] * (best + _CHUNK_COST) > _COMPACT_BELOW * len(alive) * (size + _CHUNK_COST):
        return None
    chunks, kept = [], []
    for c, chunk in enumerate(slots):
        for first in range(0, len(chunk), best):
            rows = chunk[first : first + best]
            chunks.append(c)
            kept.append(rows + [-1] * (best - len(rows)))
    return chunks, kept


def _compact(
    key_values: KeyValues,
    keep: tuple[list[int], list[list[int]]],
    rows: torch.Tensor,
    alive: torch.Tensor,
    tokens: torch.Tensor,
    filler_row: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compact `key_values` to `keep` in place; returns row, liveness and last token of each remaining slot."""
    chunks = torch.tensor(keep[0], device=rows.device)
    slots = torch.tensor(keep[1], device=rows.device)
    filler = (slots < 0).flatten()
    slots = torch.where(slots < 0, slots[:, :1], slots)  # fillers repeat the chunk's first row
    key_values.select(chunks, slots)
    slots = slots.flatten()
    return rows[slots].masked_fill(filler, filler_row), alive[slots] & ~filler, tokens[slots]


def _copy(param: nn.Parameter, device: torch.device | None, dtype: torch.dtype | None) -> nn.Parameter:
    """A copy without gradient. A parameter on the meta device becomes uninitialized memory, on the CPU if no device is given."""
    place = device or (torch.device("cpu") if param.is_meta else param.device)
    new = torch.empty_like(param, dtype=dtype or param.dtype, device=place, requires_grad=False)
    return nn.Parameter(new if param.is_meta else new.copy_(param.detach()), requires_grad=False)


def _checksum(tensor: torch.Tensor) -> int:
    """Sum of the bit patterns, exact in any order of summation."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integer).sum(dtype=torch.int64))
