"""Sampling in an engine's process, from the trainer's side: one request, its groups as they finish, and how to stop it."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Sequence

import numpy as np

from srpo.rollout.engine import Groups, Sample, SamplingParams
from srpo.rollout.engine_process import EngineError, EngineFailure, EngineProcess


def ask(
    process: EngineProcess,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    seeds: Sequence[int],
    missing: Sequence[int],
    version: int,
) -> Groups:
    """(prompt index, its samples) of the prompts `missing`, as they finish, from weights of `version`.

    Closed early, it has the process stop, which then waits for requests. Raises EngineError where the process gives what was not
    asked for (it is killed then), EngineFailure where it died or hangs.
    """
    waiting = set(missing)
    try:
        asked = [(i, list(prompts[i])) for i in missing]
        process.send("generate", prompts=asked, params=params, seeds=[seeds[i] for i in missing], version=version)
        while "done" not in (reply := process.receive()):
            i, rows = reply["prompt"], reply["samples"]
            if i not in waiting or len(rows) != params.group_size:
                raise EngineError(f"vLLM gave {len(rows)} samples for prompt {i}, which was not asked for, or not so often")
            waiting.remove(i)
            yield i, [sample_of(i, version, *row) for row in rows]
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
        process.send("abort")
        while "done" not in process.receive():
            pass
    except EngineFailure as failure:
        warnings.warn(
            f"vLLM failed while it stopped sampling, and will be started again: {failure}", RuntimeWarning, stacklevel=2
        )
    except BaseException:
        process.kill()
        raise


def sample_of(
    prompt: int, version: int, ids: list[int], logprobs: list[float], finish: str, support: str | None = None
) -> Sample:
    """One response of a process's reply; support: [L, K] int32 in base64."""
    kept = None
    if support is not None:
        kept = np.frombuffer(base64.b64decode(support), dtype="<i4").reshape(len(ids), -1)
    return Sample(prompt, tuple(ids), tuple(logprobs), finish, version, kept)
