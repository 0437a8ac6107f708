"""Starting checkpoints, trained rows and scores behind the tables, for one seed. Each is made once.

    start/data, start/base, start/sft    as in `srpo.demo`: pairs, tokenizer and model, the policy after SFT
    start/responses                      scored responses of the SFT policy, from which the pairs of DPO are made
    start/dpo                            the policy from which reinforcement learning starts (5.1.7)
    start/judge_pairs, judge_responses   other pairs and a response of the SFT policy to each, from which judgments are made
    start/judge-generative, -scalar      R_phi and the scalar reward model
    start/select                         training data selected by the judge
    <recipe>/                            a run of srpo.train, and its scores on a test set, `wild.json` or `balanced.json`

A stage that was killed continues when it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from srpo.core.batch import Rollout, write_rollouts
from srpo.core.config.demo import DemoConfig
from srpo.core.config.dpo import DpoConfig, PairRules
from srpo.core.config.judge import JudgeConfig, JudgeGrpoConfig, MineConfig
from srpo.core.config.reproduce import Scale
from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import LossConfig, OptimizerConfig, PolicyConfig, RolloutConfig, TrainConfig
from srpo.core.files import read_result, write_result
from srpo.core.metrics import read_metrics
from srpo.core.progress import Progress
from srpo.core.run_dir import claim_run_dir
from srpo.core.step_presets import PAPER
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import load_examples, read_examples, write_examples
from srpo.data.tokenizer import encode_prompts, load_tokenizer
from srpo.data.world import World
from srpo.dpo import dpo
from srpo.experiments.recipes import Recipe, base, config_of
from srpo.experiments.start import PROMPT, make_base, make_data, sft_config, stage
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel
from srpo.rewards.hybrid import score
from srpo.rewards.judge import OracleJudge
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.rollouts import to_rollouts
from srpo.select import run as run_selection
from srpo.sft import sft
from srpo.train import train
from srpo.train_judge import train_judge
from srpo.training.evaluation import evaluate_policy
from srpo.training.resume import finished_policy
from srpo.training.run import derive_seed

TEST_SETS = {"wild": "eval.jsonl", "balanced": "eval_balanced.jsonl"}
CHUNK = 64  # prompts per call of the engine
MAX_NEW_TOKENS = 80


@dataclass(frozen=True)
class Lab:
    """The folder of one seed. Each method makes its result if it does not exist yet."""

    root: Path
    seed: int
    scale: Scale
    parallel: Parallel

    @property
    def start(self) -> Path:
        return self.root / "start"

    def data(self, name: str = "train.jsonl") -> Path:
        """Path of a file of pairs."""
        self._demo(lambda cfg: stage(self.start / "data", "making the data", lambda out: make_data(cfg, out)))
        return self.start / "data" / name

    def sft(self) -> Path:
        """The policy after SFT on demonstrations of the imperfect teacher."""
        done = self.start / "sft" / "policy"
        data = self.data().parent

        def make(cfg: DemoConfig) -> Path:
            stage(self.start / "base", "making tokenizer and model", lambda out: make_base(cfg, data, out))
            return sft(sft_config(cfg), self.parallel)

        return finished_policy(done.parent) if done.is_dir() else self._demo(make)

    def _demo(self, make: Callable[[DemoConfig], Any]) -> Any:
        scale = self.scale
        return make(
            DemoConfig(
                run_dir=str(self.start),
                seed=self.seed,
                num_eval=scale.num_eval,
                num_demonstrations=scale.num_demonstrations,
                bias=scale.bias,
                num_train=scale.num_train,
                sft_steps=scale.sft_steps,
                sft_lr=scale.sft_lr,
                model=scale.model,
            )
        )

    def responses(self) -> Path:
        """rollouts.jsonl of the SFT policy on the first `dpo_prompts` training pairs, with the rewards of training."""
        examples = islice(read_examples(self.data(), PAPER), self.scale.dpo_prompts)
        return self._respond("responses", examples, self.scale.group_size)

    def judge_pairs(self) -> Path:
        """Path of the pairs that only judges train on: many queries, and none from the training of the policy."""
        out = self.start / "judge_pairs"
        first = self.scale.num_demonstrations + self.scale.num_train
        pairs = World(self.seed).examples("train", self.scale.judge_pairs, start=first)

        def make(out: Path) -> None:
            write_examples(out / "pairs.jsonl", pairs)

        stage(out, "making pairs for judges", make)
        return out / "pairs.jsonl"

    def _respond(self, name: str, examples: Iterable[Example], group_size: int) -> Path:
        """rollouts.jsonl in `start/name`: responses of the SFT policy, with the rewards of training."""
        policy = self.sft()

        def make(out: Path) -> None:
            pairs = list(examples)
            engine, schema = LocalEngine(load_policy(policy)), PAPER
            tokenizer: Any = load_tokenizer(policy)
            params = SamplingParams(MAX_NEW_TOKENS, 0.99, 100, group_size, stop_ids(tokenizer))
            judge = OracleJudge(self.scale.judge_error_rate, self.seed, schema)
            with Progress("sampling the SFT policy", len(pairs)) as bar:
                for first in range(0, len(pairs), CHUNK):
                    chunk = pairs[first : first + CHUNK]
                    prompts = encode_prompts(tokenizer, chunk, PromptForm(PROMPT))
                    samples = engine.generate(prompts, params, derive_seed(self.seed, first))
                    rollouts = to_rollouts(chunk, samples, prompts, schema, tokenizer, 0, first_group=first)
                    scored: list[Rollout] = score(rollouts, [chunk[r.group - first] for r in rollouts], schema, judge)
                    write_rollouts(out / "rollouts.jsonl", scored, step=1)
                    bar.advance(len(chunk))

        stage(self.start / name, "sampling responses", make)
        return self.start / name / "rollouts.jsonl"

    def dpo(self) -> Path:
        """The policy after DPO on pairs of a right and a wrong verdict, from which reinforcement learning starts."""
        cfg = DpoConfig(
            run_dir=str(self.start / "dpo"),
            seed=self.seed,
            rollouts=str(self.responses()),
            data=str(self.data()),
            rules=PairRules(seed=self.seed),
            num_steps=self.scale.dpo_steps,
            micro_batch_tokens=4096,
            policy=PolicyConfig(path=str(self.sft())),
            optimizer=OptimizerConfig(lr=self.scale.dpo_lr, warmup_steps=3, schedule="linear"),
        )
        done = self.start / "dpo" / "policy"
        return finished_policy(done.parent) if done.is_dir() else dpo(cfg, self.parallel)

    def judge(self, kind: str) -> dict[str, Any]:
        """`judge.json` of R_phi ("generative") or of the scalar reward model ("scalar"), trained on judged responses (5.1.6)."""
        run_dir = self.start / f"judge-{kind}"
        training = TrainConfig(micro_batch_tokens=4096, checkpoint_every=20, keep_checkpoints=1, log_rollouts=False)
        optimizer = OptimizerConfig(lr=self.scale.judge_lr, warmup_steps=3, schedule="linear")
        cfg = JudgeConfig(
            run_dir=str(run_dir),
            kind="scalar" if kind == "scalar" else "generative",
            data=str(self.judge_pairs()),
            rollouts=str(self._respond("judge_responses", read_examples(self.judge_pairs(), PAPER), 1)),
            held_out=1000,
            sft=SftConfig(
                seed=self.seed,
                num_steps=self.scale.judge_sft_steps,
                batch_size=32,
                micro_batch_tokens=8192,
                checkpoint_every=100,
                policy=PolicyConfig(path=str(self.sft())),
                optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20, schedule="linear"),
            ),
            mine=MineConfig(num_responses=1500, num_votes=4, balance=()),
            grpo=JudgeGrpoConfig(
                num_steps=self.scale.judge_grpo_steps,
                rollout=RolloutConfig(num_prompts=32, group_size=8),
                loss=LossConfig(kl_coef=0.001),
                optimizer=optimizer,
                train=training,
            ),
        )
        return train_judge(cfg, self.parallel)

    def training_data(self, recipe: Recipe) -> Path:
        """Path of the pairs that a recipe trains on; for Table 8, half as many as a whole run draws."""
        if recipe.data == "train":
            return self.data()
        num = self.scale.num_steps * self.scale.num_prompts

        def cut(out: Path) -> None:
            for name, count in (("pool", num), ("random_half", num // 2)):
                write_examples(out / f"{name}.jsonl", islice(read_examples(self.data(), PAPER), count))

        stage(self.start / "pool", "cutting the pool", cut)
        if recipe.data == "random_half":
            return self.start / "pool" / "random_half.jsonl"
        common = base(self.scale, self.start, self.start / "pool" / "pool.jsonl", Path(), self.dpo(), self.seed)
        fields = {name: value for name, value in vars(common).items() if name != "data"}
        cfg = SelectConfig(
            **fields,
            data=replace(common.data, eval=""),
            format="jsonl",
            select=Criteria(score="uncertain", num_examples=num // 2, short="take_all"),
        )
        out = self.start / "select" / "selected" / "selected.jsonl"
        if not (out.parent / "selection.json").is_file():
            run_selection(cfg, self.parallel)
        return out

    def policy(self, name: str, recipe: Recipe) -> Path:
        """The checkpoint of a row, trained if missing. Raises UserError if it was trained with other settings."""
        if not recipe.train:
            return self.sft() if recipe.start == "sft" else self.dpo()
        judge_path = None
        if recipe.judge:
            self.judge(recipe.judge)
            judge_path = self.start / f"judge-{recipe.judge}" / "policy"
        run_dir = self.root / name
        start = self.sft() if recipe.start == "sft" else self.dpo()
        common = base(self.scale, run_dir, self.training_data(recipe), self.data(TEST_SETS["wild"]), start, self.seed)
        cfg = config_of(recipe, common, judge_path)
        if (run_dir / "policy").is_dir():
            claim_run_dir(run_dir, cfg, self.parallel.is_main)
            return finished_policy(run_dir)
        return train(cfg, self.parallel)

    def results(self, name: str, recipe: Recipe, test_set: str) -> dict[str, Any]:
        """Scores of a row on a test set ("wild" or "balanced"), decoded greedily."""
        path = self.root / name / f"{test_set}.json"
        policy = self.policy(name, recipe)  # even if its scores exist: UserError if they are of other settings
        if not path.is_file():
            examples = load_examples(self.data(TEST_SETS[test_set]), PAPER, self.scale.num_eval)
            results, _ = evaluate_policy(
                LocalEngine(load_policy(policy)),
                load_tokenizer(policy),
                PAPER,
                examples,
                form=PromptForm(PROMPT),
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=256,
                description=f"{name} on {test_set}",
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_result(path, results)
        return read_result(path)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """[(responses sampled so far, macro F1 on the first pairs of the wild set)] of the training of a row."""
        points, num_responses = [], 0
        for line in read_metrics(self.root / name / "metrics.jsonl"):
            num_responses += int(line["rollout/num_responses"])
            if "eval/macro_f1" in line:
                points.append((num_responses, float(line["eval/macro_f1"])))
        return points
