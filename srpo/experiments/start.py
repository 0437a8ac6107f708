"""The stages of `srpo.demo`, `srpo.reproduce` and a first `srpo.train`: data of the world, tokenizer, new policy, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from srpo.core.config.demo import DemoConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import (
    Config,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    SamplerConfig,
    TrainConfig,
)
from srpo.core.files import check_whole, whole_folder
from srpo.core.progress import Progress
from srpo.core.step_presets import PAPER
from srpo.data.adversarial import with_attacks
from srpo.data.pairs import read_pairs, write_pairs
from srpo.data.prompts import build_prompt
from srpo.data.readers import write_examples
from srpo.data.teacher import teach
from srpo.data.tokenizer import train_tokenizer
from srpo.data.world import World
from srpo.policy.model import make_tiny

PROMPT = "Query: {query}\nItem: {item}\n"  # a tiny model learns the steps from demonstrations
# Fixed texts of prompts and responses; each becomes one token.
PHRASES = (
    "Query: ", "\nItem: ", "\nbrand: ", "\ncolor: ", "\ncategory: ", "\ntext: ",
    "1. Query intent: ", "\n2. Item: ", "\n3. Category match: ", "\n4. Attribute match: ", "\n5. Verdict: ",
)  # fmt: skip


def stage(out: Path, title: str, make: Callable[[Path], None]) -> None:
    """Make the folder `out` unless it exists; it gets its name only when it is complete.

    Raises UserError if it exists and is not as it was written.
    """
    if out.is_dir():
        check_whole(out)
        return
    print(title, flush=True)
    with whole_folder(out) as aside:
        make(aside)


def make_data(cfg: DemoConfig, out: Path) -> None:
    """Write pairs for training and evaluation (train.jsonl, eval.jsonl) and demonstrations (sft.jsonl) into `out`."""
    world = World(cfg.seed)
    write_examples(out / "train.jsonl", world.examples("train", cfg.num_train, start=cfg.num_demonstrations))
    write_examples(out / "eval.jsonl", world.examples("wild", cfg.num_eval))
    write_examples(out / "eval_balanced.jsonl", world.examples("balanced", cfg.num_eval))
    pairs = world.examples("train", cfg.num_demonstrations)
    if cfg.adversarial_frac:
        pairs = iter(with_attacks(list(pairs), cfg.adversarial_frac, cfg.seed, PAPER))
    with Progress("demonstrations", cfg.num_demonstrations) as bar:

        def demonstrations() -> Iterator[tuple[str, str]]:
            for example in pairs:
                yield build_prompt(example, PROMPT, attacked=True), teach(example, cfg.bias, cfg.seed)
                bar.advance()

        write_pairs(out / "sft.jsonl", demonstrations())


def make_base(cfg: DemoConfig, data: Path, out: Path) -> None:
    """Write a tokenizer trained on the demonstrations and an untrained policy into `out`."""
    texts = [strip(prompt + response) for prompt, response in read_pairs(data / "sft.jsonl")]
    tokenizer = train_tokenizer(texts[:20_000], cfg.vocab_size, PHRASES)
    make_tiny(tokenizer, cfg.model, cfg.seed).save_pretrained(out)
    tokenizer.save_pretrained(out)


def strip(text: str) -> str:
    """The text with line breaks in place of the fixed phrases, which are tokens of their own."""
    for phrase in PHRASES:
        text = text.replace(phrase, "\n")
    return text


def sft_config(cfg: DemoConfig) -> SftConfig:
    """Settings of the SFT warm start."""
    run_dir = Path(cfg.run_dir)
    return SftConfig(
        run_dir=str(run_dir / "sft"),
        seed=cfg.seed,
        data=str(run_dir / "data" / "sft.jsonl"),
        num_steps=cfg.sft_steps,
        batch_size=cfg.sft_batch,
        checkpoint_every=200,
        policy=PolicyConfig(path=str(run_dir / "base")),
        optimizer=OptimizerConfig(lr=cfg.sft_lr, warmup_steps=30, schedule="linear", min_lr_frac=0.1),
    )


def train_config(cfg: DemoConfig, policy: Path) -> Config:
    """Settings of Algorithm 1 on hybrid step rewards."""
    run_dir = Path(cfg.run_dir)
    return Config(
        run_dir=str(run_dir),
        seed=cfg.seed,
        num_steps=cfg.rl_steps,
        data=DataConfig(
            train=str(run_dir / "data" / "train.jsonl"),
            eval=str(run_dir / "data" / "eval.jsonl"),
            prompt=PROMPT,
            adversarial_frac=cfg.adversarial_frac,
        ),
        policy=PolicyConfig(path=str(policy)),
        rollout=RolloutConfig(num_prompts=cfg.num_prompts, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens),
        reward=RewardConfig(judge="oracle", judge_error_rate=cfg.judge_error_rate),
        advantage=cfg.advantage,
        loss=LossConfig(kl_coef=cfg.kl_coef),
        optimizer=OptimizerConfig(lr=cfg.rl_lr, warmup_steps=3, schedule="linear", min_lr_frac=0.1),
        sampler=SamplerConfig(),
        train=TrainConfig(micro_batch_tokens=4096, checkpoint_every=15, eval_every=cfg.eval_every, eval_examples=256),
    )
