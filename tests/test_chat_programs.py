"""An instruct model through the programs: SFT, reinforcement, selection and evaluation ask it in its own chat template."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_families import END, FAMILIES, family_tokenizer
from small_world import ONE, TINY

import srpo.evaluate
from srpo.core.batch import Rollout, read_rollouts
from srpo.core.config.chat import ChatConfig
from srpo.core.config.evaluation import EvaluateConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config, DataConfig, OptimizerConfig, PolicyConfig, RolloutConfig, SamplerConfig, TrainConfig
from srpo.core.metrics import read_metrics
from srpo.core.step_presets import StepsConfig
from srpo.data.chat import end_id
from srpo.data.pairs import write_pairs
from srpo.data.prompts import PromptForm, build_prompt
from srpo.data.readers import load_examples, write_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.data.world import World
from srpo.policy.model import make_tiny
from srpo.sft import sft, tokenized_pairs
from srpo.train import train


@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_asks_in_the_chat_template(family: str, tmp_path: Path) -> None:
    tokenizer = family_tokenizer(family)
    make_tiny(tokenizer, replace(TINY, max_context=1024), 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    guidelines = tmp_path / "guidelines.txt"
    guidelines.write_text(f"A knife is no fork.\nText such as {END[family]} is text.\n")
    world = World(random.randrange(2**31)).examples("wild", 6)
    write_examples(tmp_path / "pairs.jsonl", (replace(e, gold=e.gold[-1:], truth=e.truth[-1:]) for e in world))
    data = DataConfig(train=str(tmp_path / "pairs.jsonl"), eval=str(tmp_path / "pairs.jsonl"), guidelines=str(guidelines))
    chat = ChatConfig(system="" if family == "gemma" else "You are a careful judge.")
    cfg = Config(
        run_dir=str(tmp_path / "rl"),
        num_steps=1,
        steps=StepsConfig(preset="verdict"),
        data=data,
        policy=PolicyConfig(path=str(tmp_path / "sft" / "policy")),
        rollout=RolloutConfig(num_prompts=4, group_size=3, max_new_tokens=8),
        sampler=SamplerConfig(difficulty_low=-1.0, difficulty_high=2.0),  # all groups train, wrong as they are
        train=TrainConfig(micro_batch_tokens=2048),
    )
    form = PromptForm.of(data, cfg.schema)
    examples = load_examples(data.train, cfg.schema)
    texts = {example.example_id: build_prompt(example, form) for example in examples}
    assert all("A knife is no fork." in text and "Verdict: L1 (irrelevant)" in text for text in texts.values())

    write_pairs(tmp_path / "sft.jsonl", [(texts[e.example_id], cfg.schema.write([e.grade or ""])) for e in examples])
    warm = SftConfig(
        run_dir=str(tmp_path / "sft"),
        data=str(tmp_path / "sft.jsonl"),
        num_steps=2,
        batch_size=4,
        policy=PolicyConfig(path=str(tmp_path / "base"), chat=chat),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    asked = load_tokenizer(tmp_path / "base", chat=chat)
    pairs = tokenized_pairs(warm, asked, 1024, show=False)
    assert all(response[-1] == end_id(asked) == asked.convert_tokens_to_ids(END[family]) for _, response in pairs)
    sft(warm, ONE)
    train(cfg, ONE)  # the chat is that of the SFT checkpoint, without a setting

    system = [{"role": "system", "content": chat.system}] if chat.system else []
    end = asked.convert_tokens_to_ids(END[family])

    def check(rollouts: list[Rollout]) -> None:
        for rollout in rollouts:
            messages: Any = [*system, {"role": "user", "content": "MESSAGE"}]
            frame = asked.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
            before, after = str(frame).split("MESSAGE")
            text = asked.decode(list(rollout.prompt_ids))
            assert (
                text == before + (texts[rollout.example_id].strip() if family != "chatml" else texts[rollout.example_id]) + after
            )
            assert rollout.prompt_ids.count(end) == str(frame).count(END[family])  # that of the guidelines ends no turn

    sampled = [rollout for _, rollout in read_rollouts(tmp_path / "rl" / "rollouts.jsonl")]
    assert len(sampled) == 12
    check(sampled)
    metrics = read_metrics(tmp_path / "rl" / "metrics.jsonl")[-1]
    assert metrics["rollout/mismatch_kl"] < 1e-5 and metrics["rollout/mismatch_max"] < 1e-5  # type: ignore[operator]
    srpo.evaluate.main(EvaluateConfig(checkpoint=str(tmp_path / "rl" / "policy"), by=(), out=str(tmp_path / "out")))
    judged = [rollout for _, rollout in read_rollouts(tmp_path / "out" / "rollouts.jsonl")]
    assert len(judged) == 6
    check(judged)
    ranking = json.loads((tmp_path / "out" / "results.json").read_text())["ranking"]
    assert ranking["num_unread"] == sum(rollout.answers[-1] is None for rollout in judged)
