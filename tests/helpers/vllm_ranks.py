"""Run under torchrun: a sharded policy is synced into each rank's own engine; on rank 1 the engine's process dies meanwhile.
`python vllm_ranks.py FOLDER`; FOLDER holds a checkpoint, and rank<r>.json is written there."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from srpo.core.config.train import VllmConfig
from srpo.policy.model import Policy, load_policy
from srpo.policy.parallel import init_parallel
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.engine import VllmEngine


def main(folder: Path) -> None:
    parallel = init_parallel()
    model = load_policy(folder)
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    policy = parallel.shard(Policy(model))
    assert any(isinstance(p, DTensor) for p in policy.parameters())
    tricks = {"marker": str(folder / "failed")} | ({"die": "load:2"} if parallel.rank else {})
    command = (str(Path(__file__).with_name("fake_engine.py")), json.dumps(tricks))
    engine = VllmEngine(folder, config=VllmConfig(bucket_mib=1), command=command)
    engine._store.bucket_bytes = 20_000
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.sync_weights(policy, 1)
        first = engine.generate([(1,)], SamplingParams(max_new_tokens=2, group_size=1), 0)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(2)
        engine.sync_weights(policy, 2)
        second = engine.generate([(1,)], SamplingParams(max_new_tokens=2, group_size=1), 0)
    result = {
        "total": total,
        "sums": [-sample.sampling_logprobs[0] for sample in (*first, *second)],
        "num_restarts": engine.stats()["num_restarts"],
        "num_warnings": sum("weight sync" in str(w.message) for w in caught),
        "num_buckets": len(engine._store.buckets),
    }
    (folder / f"rank{parallel.rank}.json").write_text(json.dumps(result), encoding="utf-8")
    engine.close()
    parallel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
