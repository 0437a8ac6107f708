"""Run under torchrun: every two ranks share an engine, and sample on a thread in parallel with the main one.
`python shared_ranks.py FOLDER [real]`; FOLDER holds a checkpoint, and rank<r>.json is written there.

Without "real" it takes 4 ranks and the fake engine, and the second engine's process dies meanwhile. At the end ranks 1 and 2
exit: rank 1 used the engine of rank 0, rank 2 owned the engine of rank 3."""

from __future__ import annotations

import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from srpo.core.config.train import VllmConfig
from srpo.policy.model import Policy, load_policy
from srpo.policy.parallel import Parallel, init_parallel
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.engine import WORKER
from srpo.rollout.vllm.process import EngineError
from srpo.rollout.vllm.shared_engine import SharedEngine
from srpo.rollout.vllm.shared_start import open_shared

PROMPTS = [(5, 6, 7), (8,), (9, 10), (11, 12)]
PARAMS = SamplingParams(max_new_tokens=8, group_size=4)


def sample(engine: SharedEngine, policy: nn.Module, parallel: Parallel) -> list[list[Any]]:
    """This rank's share of the prompts after each of two syncs: [response ids, log-probabilities]."""
    share = list(range(parallel.rank, len(PROMPTS), parallel.world_size))
    samples = []
    with ThreadPoolExecutor(1) as pool:
        for version in (1, 2):
            engine.sync_weights(policy, version)
            future = pool.submit(engine.generate, [PROMPTS[i] for i in share], PARAMS, 5, share)
            parallel.barrier()  # the main thread's collectives go on meanwhile
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(2)
            samples += [[s.response_ids, s.sampling_logprobs] for s in future.result()]
    return samples


def last_error(engine: SharedEngine, policy: nn.Module, rank: int) -> str:
    """The errors of ranks 0 and 3 after the ranks with which they share an engine have exited."""
    if rank in (1, 2):
        os._exit(0)
    try:
        if rank == 0:
            engine.sync_weights(policy, 3)
        else:
            engine.generate([(1,)], PARAMS, 0)
    except EngineError as error:
        return str(error)
    return ""


def main(folder: Path, real: bool) -> None:
    parallel = init_parallel()
    model = load_policy(folder)
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    policy = parallel.shard(Policy(model))
    assert any(isinstance(p, DTensor) for p in policy.parameters())
    tricks = {"marker": str(folder / "failed")} | ({"die": "generate:2"} if parallel.rank >= 2 else {})
    command = WORKER if real else (str(Path(__file__).with_name("fake_engine.py")), json.dumps(tricks))
    config = VllmConfig(bucket_mib=1, tensor_parallel_size=2, kv_cache_mib=64, max_num_seqs=16)
    engine = open_shared(folder, parallel, dtype=torch.float32, max_context=0, config=config, command=command)
    warnings.simplefilter("ignore")
    result = {
        "leads": engine._server is not None,
        "total": total,
        "samples": sample(engine, policy, parallel),
        "num_restarts": engine.stats()["num_restarts"],
    }
    path = folder / f"rank{parallel.rank}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    if not real:
        error = last_error(engine, policy, parallel.rank)
        path.write_text(json.dumps({**result, "error": error}), encoding="utf-8")
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # the process group has lost ranks, so it cannot be closed


if __name__ == "__main__":
    main(Path(sys.argv[1]), real=sys.argv[2:] == ["real"])
