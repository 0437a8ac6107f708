"""A sampling request to an engine's process: sends it, yields its groups as they finish, aborts it."""

from __future__ import annotations

import base64
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from srpo.rollout.engine import Groups, Sample, SamplingParams
from srpo.rollout.vllm.process import EngineError, EngineFailure, EngineProcess

# (prompt index, its responses as JSON, see `srpo.rollout.vllm.server.Response`), or None as a heartbeat
Replies = Generator[tuple[int, list[list[Any]]] | None, None, None]


def request_samples(
    process: EngineProcess,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    seeds: Sequence[int],
    missing: Sequence[int],
    version: int,
) -> Replies:
    """Samples the prompts with indices `missing` from weights of `version`; yields (prompt index, its responses) as they finish.

    If the generator is closed early, the process drops the rest and waits for the next request. Raises EngineError if the replies
    do not match the request (the process is killed), EngineFailure if the process died or hangs.
    """
    waiting = set(missing)
    try:
        numbered = [(i, list(prompts[i])) for i in missing]
        process.send("generate", prompts=numbered, params=params, seeds=[seeds[i] for i in missing], version=version)
        while "done" not in (reply := process.receive(signs=True)):
            if "alive" in reply:
                yield None
                continue
            i, rows = reply["prompt"], reply["samples"]
            if i not in waiting or len(rows) != params.group_size:
                raise EngineError(
                    f"vLLM returned {len(rows)} samples for prompt {i}: expected {params.group_size} for one of {sorted(waiting)}"
                )
            waiting.remove(i)
            yield i, rows
        if waiting:
            raise EngineError(f"vLLM returned no samples for {len(waiting)} of {len(missing)} prompts")
    except EngineFailure:
        raise
    except GeneratorExit:
        abort(process)
        raise
    except BaseException:  # a late reply would be read as the answer to the next request
        process.kill()
        raise


def abort(process: EngineProcess) -> None:
    """Abort the running request and discard the replies sent before the process noticed. If the process fails meanwhile, it is
    killed with a warning, and the next request starts a new one."""
    try:
        with process.killed_unless_done():
            process.send("abort")
            while "done" not in process.receive():
                pass
    except EngineFailure as failure:
        warnings.warn(f"vLLM failed while aborting a request and will be started again: {failure}", RuntimeWarning, stacklevel=2)


def samples_of(replies: Replies, version: int, stats: dict[str, float]) -> Groups:
    """Yields (prompt index, its samples with policy version `version`); keeps num_tokens, generate_s, tokens_per_s in `stats`."""
    start, num_tokens = time.perf_counter(), 0
    with closing(replies):
        for group in replies:
            if group is not None:
                samples = [sample_of(group[0], version, *row) for row in group[1]]
                num_tokens, seconds = num_tokens + sum(len(s.response_ids) for s in samples), time.perf_counter() - start
                stats |= {"num_tokens": float(num_tokens), "generate_s": seconds, "tokens_per_s": num_tokens / seconds}
                yield group[0], samples


def sample_of(
    prompt: int,
    version: int,
    ids: list[int],
    logprobs: list[float],
    finish: str,
    support: str | None = None,
    routed: tuple[int, int, str] | None = None,
) -> Sample:
    """The `Sample` of one response in a reply; for support and routed see `srpo.rollout.vllm.server.Response`."""
    support_ids = None
    if support is not None:
        support_ids = np.frombuffer(base64.b64decode(support), dtype="<i4").reshape(len(ids), -1)
    experts = None
    if routed is not None:
        experts = np.frombuffer(base64.b64decode(routed[2]), dtype="<i2").reshape(-1, routed[0], routed[1])
    return Sample(prompt, tuple(ids), tuple(logprobs), finish, version, support_ids, experts)
