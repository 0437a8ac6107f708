"""Shared by tests of `srpo.select`: examples, a scripted engine that can be killed, ranks that run one after the other."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srpo.core.config.selection import SelectConfig
from srpo.core.config.train import DataConfig, RewardConfig, RolloutConfig
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm, build_prompt
from srpo.data.readers import write_examples
from srpo.data.tokenizer import encode, train_tokenizer
from srpo.policy.parallel import Parallel
from srpo.rewards.judge import OracleJudge
from srpo.rollout.engine import Sample, SamplingParams
from srpo.select import Parts, records_dir

SCHEMA = PAPER
RESPONSE = """1. Query intent: {}
2. Item: boots; color blue
3. Category match: {}
4. Attribute match: color ok -> match
5. Verdict: L{}"""
TEMPLATE = "{query} | {title}\n"
TOKENIZER: Any = train_tokenizer([RESPONSE, TEMPLATE, "shoes boots related match"], vocab_size=320)
NUM = 41


def example(i: int) -> Example:
    grade = 1 + i % 4
    return Example(
        f"e{i}",
        f"q{i}",
        f"query {i}",
        f"title {i}",
        gold=(None, None, "related", None, f"L{grade}"),
        truth=("shoes", "boots; color red" if i % 3 else "boots; color blue", "related", "match", f"L{grade}"),
        tags={"query_type": "odd" if i % 2 else "even"},
    )


EXAMPLES = [example(i) for i in range(NUM)]
PROMPTS = {encode(TOKENIZER, build_prompt(e, TEMPLATE)): e.example_id for e in EXAMPLES}


class Killed(Exception):
    """Simulates the end of the process."""


class Scripted:
    """An engine whose texts are a hash of (seed, prompt number, sample number). Raises Killed after `dies_after` calls.

    Every fifth example always gets the same text, whose verdict is correct for a quarter of those examples.
    """

    policy_version = 0

    def __init__(self, dies_after: int = 10**9) -> None:
        self.sampled: Counter[str] = Counter()
        self.calls = 0
        self.dies_after = dies_after

    def generate(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> list[Sample]:
        if self.calls == self.dies_after:
            raise Killed
        self.calls += 1
        samples = []
        for i, prompt in enumerate(prompts):
            self.sampled[PROMPTS[prompt]] += 1
            for g in range(params.group_size):
                same = int(PROMPTS[prompt][1:]) % 5 == 0
                draw = bytes(64) if same else hashlib.blake2b(f"{seed} {i} {g}".encode()).digest()
                text = RESPONSE.format("shoes" if draw[0] % 2 else "hats", "related" if draw[1] % 3 else "match", 1 + draw[2] % 4)
                samples.append(Sample(i, (*encode(TOKENIZER, text), TOKENIZER.eos_token_id), (), "stop"))
        return samples

    def sync_weights(self, policy: Any, version: int) -> None: ...
    def sleep(self) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, float]:
        return {}


class Ranks(Parallel):
    """One of several ranks that run one after the other; a broadcast returns this rank's own object."""

    def broadcast_object(self, x: Any) -> Any:
        return x

    def barrier(self) -> None: ...


class Fresh(Ranks):
    """One of several ranks that all start before any shard is finished: the broadcast set of finished shards is empty."""

    def broadcast_object(self, x: Any) -> Any:
        return frozenset()


ONE = Ranks(0, 1, 0, torch.device("cpu"))


def config(folder: Path, data: Path | None = None, **changes: Any) -> SelectConfig:
    if data is None:
        data = folder / "data.jsonl"
        if not data.exists():
            write_examples(data, EXAMPLES)
    cfg = SelectConfig(
        run_dir=str(folder / "run"),
        shard_examples=8,
        data=DataConfig(train=str(data), prompt=TEMPLATE),
        rollout=RolloutConfig(group_size=6, max_new_tokens=80),
        reward=RewardConfig(judge="oracle", judge_error_rate=0.1),
    )
    return replace(cfg, **changes)


def parts_with(engine: Any) -> Callable[..., Parts]:
    judge = OracleJudge(0.1, 0, SCHEMA)
    params = SamplingParams(max_new_tokens=80, group_size=6)

    def parts(cfg: SelectConfig | None = None, *_: Any) -> Parts:
        form = PromptForm(TEMPLATE) if cfg is None else PromptForm.of(cfg.data, cfg.schema)
        return Parts(TOKENIZER, form, engine, judge, params, 400)

    return parts


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files below `folder`, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def results(cfg: SelectConfig) -> dict[str, bytes]:
    """`contents` of the records folder without config.toml and *.json, which contain paths."""
    files = contents(records_dir(cfg))
    return {name: data for name, data in files.items() if not name.endswith(("config.toml", ".json"))}
