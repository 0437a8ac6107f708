"""One optimizer step of RL, here and in TRL's GRPOTrainer: `python bench/end_to_end.py [--json FILE] [--steps N]`.

The same model (Qwen3-MoE, 2.0 M parameters, vocabulary 2,048, fp32; or the one in `--model`), the same prompts, 16 prompts
(`--prompts`) x 8 completions x exactly 96 new tokens, beta 0.01, temperature 1, no top-k, one update. Both alternate in one
process: after each step of TRL a callback runs one of ours, so that other load on the machine affects both. Reported are medians
without the first steps of each.

TRL is an optional dependency: `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from machine import processor
from revision import commit
from transformers import PreTrainedTokenizerBase, TrainerCallback

from srpo.core.batch import Rollout, pack
from srpo.core.config.demo import TinyConfig
from srpo.core.config.train import AdvantageConfig, LossConfig, OptimizerConfig, RolloutConfig, SamplerConfig
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.data.examples import Example
from srpo.data.tokenizer import encode, load_tokenizer, train_tokenizer
from srpo.policy.model import Policy, load_policy, make_tiny, save_policy
from srpo.policy.parallel import init_parallel
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.rollouts import to_rollouts
from srpo.training.credit import assign_credit
from srpo.training.optim import make_optimizer
from srpo.training.update import Objective, update, with_logprobs

GROUP_SIZE, NEW_TOKENS, KL_COEF, LR, VOCAB = 8, 96, 0.01, 1e-5, 2048
MODEL = TinyConfig(expert_size=104)


def make_prompts(seed: int, num: int) -> list[str]:
    """Prompts of random words, with about as many tokens as the query-item pairs of the demo."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(3000)]
    return [" ".join(rng.choices(words, k=rng.randint(7, 15))) for _ in range(num)]


def make_checkpoint(folder: Path) -> None:
    """A new model and its tokenizer in `folder`."""
    tokenizer = train_tokenizer(make_prompts(0, 2000), VOCAB)
    assert len(tokenizer) == VOCAB
    model = make_tiny(tokenizer, MODEL, seed=0)
    save_policy(model, tokenizer, folder)


def made_up_reward(response_ids: tuple[int, ...] | list[int]) -> float:
    """The fraction of even token ids: cheap, and different between completions."""
    return sum(token % 2 == 0 for token in response_ids) / len(response_ids)


def with_made_up_steps(rollout: Rollout, num_steps: int) -> Rollout:
    """The rollout with `num_steps` steps of equal length and their rewards.

    An untrained model writes no steps; with made-up ones the later phases have their full work.
    """
    ends = tuple(len(rollout.response_ids) * (j + 1) // num_steps for j in range(num_steps))
    rewards = tuple(made_up_reward(rollout.response_ids[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True))
    return replace(rollout, step_ends=ends, step_rewards=rewards, reward_sources=("rule",) * num_steps)


def srpo_step(
    path: Path, dump: Path, prompts: list[str], num_prompts: int, micro_batch_tokens: int, dtype: str
) -> Callable[[], dict[str, float]]:
    """A function that runs one whole optimizer step of Algorithm 1 and returns the seconds of each phase."""
    parallel = init_parallel()
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
    model = load_policy(path)
    engine = LocalEngine(model, dtype=getattr(torch, dtype))
    policy, reference = (parallel.shard(Policy(m), dtype=dtype) for m in (model, load_policy(path).requires_grad_(False)))
    optimizer = make_optimizer(policy.parameters(), OptimizerConfig(lr=LR))
    schema, loss = PAPER, LossConfig(kl_coef=KL_COEF)
    params = SamplingParams(NEW_TOKENS, temperature=1.0, top_k=0, group_size=GROUP_SIZE, ignore_eos=True)
    objective = Objective.from_config(loss, RolloutConfig(temperature=1.0, top_k=0, group_size=GROUP_SIZE))
    everything = SamplerConfig(difficulty_low=-1.0, difficulty_high=2.0)
    rng, count = random.Random(1), 0

    def step() -> dict[str, float]:
        nonlocal count
        count += 1
        clock, laps = time.perf_counter(), {}

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            laps[phase], clock = now - clock, now

        engine.sync_weights(policy, version=count)
        lap("sync")
        texts = rng.sample(prompts, num_prompts)
        examples = [Example(str(i), str(i), text, "") for i, text in enumerate(texts)]
        ids = [encode(tokenizer, text) for text in texts]
        samples = engine.generate(ids, params, seed=count)
        assert [len(s.response_ids) for s in samples] == [NEW_TOKENS] * num_prompts * GROUP_SIZE
        lap("generate")
        rollouts = to_rollouts(examples, samples, ids, schema, tokenizer, engine.policy_version)
        rollouts = [with_made_up_steps(rollout, schema.num_steps) for rollout in rollouts]
        credit = assign_credit(rollouts, schema, AdvantageConfig(), loss, everything)
        batches = pack(rollouts, credit.advantages, credit.weights, micro_batch_tokens)
        lap("collect")
        batches = with_logprobs(batches, policy, reference, objective, parallel)
        lap("logprobs")
        metrics = update(
            policy,
            optimizer,
            batches,
            objective,
            parallel,
            step_names=[spec.name for spec in PAPER_STEPS],
            grad_clip=1.0,
            dump=dump,
            reference=reference,
        )
        lap("update")
        # Only the mean has a bound: routers of an untrained model have near-ties, and a token that changes experts differs more.
        assert metrics["rollout/mismatch_kl"] < (1e-5 if dtype == "float32" else 0.1), metrics["rollout/mismatch_kl"]
        return laps

    return step


class TakeTurns(TrainerCallback):
    """Times TRL's steps, and runs and times one of ours after each."""

    def __init__(self, ours: Callable[[], dict[str, float]]) -> None:
        self.ours = ours
        self.trl_s: list[float] = []
        self.laps: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trl_s.append(time.perf_counter() - self._start)
        self.laps.append(self.ours())
        ours = sum(self.laps[-1].values())
        print(f"step {len(self.trl_s)}: TRL {self.trl_s[-1]:.2f} s, srpo {ours:.2f} s", file=sys.stderr, flush=True)


def take_turns(
    path: Path, out: Path, prompts: list[str], ours: Callable[[], dict[str, float]], num_steps: int, num_prompts: int, dtype: str
) -> TakeTurns:
    """Run TRL's own training loop on the same checkpoint and prompts, with one of our steps after each of its steps."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert [len(ids) for ids in completion_ids] == [NEW_TOKENS] * num_prompts * GROUP_SIZE
        return [made_up_reward(ids) for ids in completion_ids]

    args = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=num_prompts * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        beta=KL_COEF,
        learning_rate=LR,
        max_grad_norm=1.0,
        max_steps=num_steps,
        model_init_kwargs={"dtype": "float32"},
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,  # TRL's default would make it slower
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    turns = TakeTurns(ours)
    trainer = GRPOTrainer(
        model=str(path),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=load_tokenizer(path),
        callbacks=[turns],
    )
    trainer.train()
    return turns


def environment(threads: int) -> dict[str, Any]:
    """Processor, versions, commit and command of the measurement."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def summary(seconds: list[float], num_completions: int) -> dict[str, Any]:
    """Median of the timed steps, and all of them."""
    median = statistics.median(seconds)
    return {
        "step_s": round(median, 4),
        "completions_per_s": round(num_completions / median, 2),
        "steps_s": [round(s, 4) for s in seconds],
    }


def main() -> int:
    """Run the benchmark. Returns the exit status: 2 if TRL is not installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each (default 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each that are thrown away (default 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: all cores)")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="rows of one forward and backward of ours")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint (default: a new tiny model)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step, 8 completions each (default 16)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the forwards; weights are fp32")
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("bench/end_to_end.py compares with TRL, which is not installed: pip install -e .[bench]", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder, num, dtype = Path(name), options.prompts, options.dtype
        path = options.model or folder / "model"
        if options.model is None:
            make_checkpoint(path)
        num_parameters = sum(p.numel() for p in load_policy(path).parameters())
        prompts = make_prompts(1, 256)
        ours = srpo_step(path, folder / "non_finite.pt", prompts, num, options.micro_batch_tokens, dtype)
        turns = take_turns(path, folder / "trl", prompts, ours, options.warmup + options.steps, num, dtype)
    laps = turns.laps[options.warmup :]
    srpo, trl = (
        summary(seconds, num * GROUP_SIZE) for seconds in ([sum(lap.values()) for lap in laps], turns.trl_s[options.warmup :])
    )
    result = {
        "ratio": round(trl["step_s"] / srpo["step_s"], 3),
        "srpo": srpo | {"breakdown_s": {phase: round(statistics.median(lap[phase] for lap in laps), 4) for phase in laps[0]}},
        "trl": trl,
        "workload": {
            "num_parameters": num_parameters,
            "num_prompts": num,
            "dtype": dtype,
            "group_size": GROUP_SIZE,
            "new_tokens": NEW_TOKENS,
            "kl_coef": KL_COEF,
            "micro_batch_tokens": options.micro_batch_tokens,
        },
        "environment": environment(options.threads),
    }
    phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in result["srpo"]["breakdown_s"].items())
    print(f"TRL  {trl['step_s']:.2f} s per step, {trl['completions_per_s']:.1f} completions/s")
    print(f"srpo {srpo['step_s']:.2f} s per step, {srpo['completions_per_s']:.1f} completions/s ({phases})")
    print(f"ratio {result['ratio']:.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
