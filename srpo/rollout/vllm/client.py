"""Sampling in an engine's process, from the trainer's side: one request, its groups as they finish, and how to stop it."""

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

# (prompt index, its responses as JSON has them: see `srpo.rollout.vllm.server.Response`); None as a sign of life
Replies = Generator[tuple[int, list[list[Any]]] | None, None, None]


def ask(
    process: EngineProcess,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    seeds: Sequence[int],
    missing: Sequence[int],
    version: int,
) -> Replies:
    """(prompt index, its responses) of the prompts `missing`, as they finish, from weights of `version`.

    Closed early, it has the process stop, which then waits for requests. Raises EngineError where the process gives what was not
    asked for (it is killed then), EngineFailure where it died or hangs.
    """
    waiting = set(missing)
    try:
        asked = [(i, list(prompts[i])) for i in missing]
        process.send("generate", prompts=asked, params=params, seeds=[seeds[i] for i in missing], version=version)
        while "done" not in (reply := process.receive(signs=True)):
            if "alive" in reply:
                yield None
                continue
            i, rows = reply["prompt"], reply["samples"]
            if i not in waiting or len(rows) != params.group_size:
                raise EngineError(f"vLLM gave {len(rows)} samples for prompt {i}, which was not asked for, or not so often")
            waiting.remove(i)
            yield i, rows
        if waiting:
            raise EngineError(f"vLLM gave nothing for {len(waiting)} prompts")
    except EngineFailure:
        raise
    except GeneratorExit:
        stop(process)
        raise
    except BaseException:  # what it is still doing is nobody's business: its replies would be taken for the next request's
        process.kill()
        raise


def stop(process: EngineProcess) -> None:
    """Have it drop what it still samples, and read what it had sent before it heard. One that fails at that is started again when
    it is needed next."""
    try:
        with process.killed_unless_done():
            process.send("abort")
            while "done" not in process.receive():
                pass
    except EngineFailure as failure:
        warnings.warn(
            f"vLLM failed while it stopped sampling, and will be started again: {failure}", RuntimeWarning, stacklevel=2
        )


def samples_of(replies: Replies, version: int, stats: dict[str, float]) -> Groups:
    """(prompt index, its samples, stamped with `version`); what is sampled and how long it took goes into `stats`."""
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
    """One response of a process's reply; support, routed: see `srpo.rollout.vllm.server.Response`."""
    kept = None
    if support is not None:
        kept = np.frombuffer(base64.b64decode(support), dtype="<i4").reshape(len(ids), -1)
    experts = None
    if routed is not None:
        experts = np.frombuffer(base64.b64decode(routed[2]), dtype="<i2").reshape(-1, routed[0], routed[1])
    return Sample(prompt, tuple(ids), tuple(logprobs), finish, version, kept, experts)
