"""`Run`: everything that a run of `srpo.train` consists of. It is built once from settings; checkpoints save and restore it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srpo.core.config.train import Config, SamplerConfig
from srpo.core.errors import UserError
from srpo.core.metrics import MetricsLogger, read_metrics
from srpo.core.run_dir import claim_run_dir
from srpo.core.steps import StepSchema
from srpo.data.adversarial import with_attacks
from srpo.data.checkpoint_tokens import check_rows
from srpo.data.curriculum import Curriculum, all_examples, load_stages
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import load_examples, load_parts
from srpo.data.splits import spread_over_queries
from srpo.data.tokenizer import encode_prompts, load_tokenizer
from srpo.policy.adapters import add_adapter
from srpo.policy.checkpoint import load_checkpoint, load_parameters, save_checkpoint
from srpo.policy.checkpoint_folders import checkpoints, latest_checkpoint
from srpo.policy.forward import context_of
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, Start, check_head, save_policy
from srpo.policy.parallel import Parallel
from srpo.policy.routing import Routers
from srpo.rewards.build import build_judge
from srpo.rewards.judge import GenerativeJudge, Judge
from srpo.rollout.build import open_engine, sampling_params
from srpo.rollout.engine import Engine, SamplingParams
from srpo.training.best import Best, best_of, check_best_has_values, evaluated
from srpo.training.changes import TRAIN
from srpo.training.checks import (
    check_device,
    check_examples,
    check_prompt_lengths,
    check_reference,
    check_settings,
    check_support,
    loss_impl,
    seen_in_training,
)
from srpo.training.credit import Credit
from srpo.training.inputs import run_inputs
from srpo.training.optim import make_optimizer
from srpo.training.ppo import Ppo
from srpo.training.resume import check_impl, check_resume
from srpo.training.update import Objective

MAX_EMPTY_STEPS = 10  # optimizer steps in a row without a group in the difficulty window after which the run stops


@dataclass(frozen=True)
class Run:
    """Settings, ranks, and all objects that live as long as a run."""

    cfg: Config
    parallel: Parallel
    schema: StepSchema
    tokenizer: Any
    form: PromptForm  # of the policy's prompts
    policy: Policy
    reference: Policy | Start | None  # pi_ref of Eq. 6; None if loss.kl_coef is 0
    optimizer: torch.optim.Optimizer
    engine: Engine
    params: SamplingParams  # the behaviour policy's
    judge: Judge | None  # R_phi of Eq. 5
    sampler: Curriculum
    eval_examples: list[Example]
    objective: Objective
    ppo: Ppo | None  # the critic of advantage.method "ppo"
    files: Mapping[str, str] = field(default_factory=dict)  # {name: text} of further files in the folders of its policies

    @property
    def loss_impl(self) -> str:
        """The kernel that computes the loss here."""
        return loss_impl(self.cfg.loss.impl, self.parallel.device, getattr(torch, self.cfg.policy.dtype))

    @property
    def run_dir(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.cfg.run_dir)

    @classmethod
    def build(cls, cfg: Config, parallel: Parallel) -> Run:
        """Read the data, build policy, reference, engine, judge and sampler, and claim the run folder. Collective.

        Raises UserError for settings or data that would fail later; the run folder is then left untouched.
        """
        check_settings(cfg, parallel.world_size)
        check_device(cfg.policy, parallel)
        schema, form, limit = cfg.schema, PromptForm.of(cfg.data, cfg.schema), cfg.train.eval_examples
        held_out: list[Example] = []

        def read(path: str) -> list[Example]:
            if cfg.data.eval_frac:
                examples, held_out[:] = load_parts(path, schema, cfg.data.eval_frac, cfg.data.columns)
            else:
                examples = load_examples(path, schema, columns=cfg.data.columns)
            return with_attacks(examples, cfg.data.adversarial_frac, cfg.seed, schema)

        stages = load_stages(cfg, read)
        examples = all_examples(stages)
        if cfg.data.eval:
            held_out = load_examples(cfg.data.eval, schema, limit, cfg.data.columns)
        eval_examples = (held_out if cfg.data.eval else spread_over_queries(held_out))[: limit or None]
        tokenizer = load_tokenizer(cfg.policy.path, cfg.policy.bos, cfg.policy.chat)
        for other in (cfg.policy.reference, cfg.critic.path):
            if other:
                check_rows(tokenizer, other, cfg.policy.path)
        params = sampling_params(cfg, tokenizer)
        model = load_to_shard(cfg.policy.path, parallel, cfg.policy)
        check_support(cfg, model.config.vocab_size)
        replay = cfg.rollout.routing == "replay"
        if replay:
            Routers(model)  # UserError if the routing of this model cannot be replayed
        check_head(model, cfg.loss.inputs)
        loss_impl(cfg.loss.impl, parallel.device, getattr(torch, cfg.policy.dtype))  # UserError if it cannot run here
        engine = open_engine(cfg, model, parallel)
        for some in (examples, eval_examples):
            prompts = encode_prompts(tokenizer, some, form)
            context = min(engine.max_context, context_of(model.config))
            check_prompt_lengths(prompts, some, params, context, cfg.train.micro_batch_tokens)
        judge = build_judge(cfg, schema, parallel)
        check_examples(examples, eval_examples, schema, judge, cfg)
        check_best_has_values(cfg, eval_examples)
        if parallel.is_main and (note := seen_in_training(examples, eval_examples)):
            print(f"{'data.eval' if cfg.data.eval else 'data.eval_frac'}: {note}", flush=True)
        sampler = Curriculum(stages, cfg.seed)
        model = add_adapter(model, cfg.policy, cfg.seed)  # after the engine, which copies the model without it
        policy = Policy(model, activation_checkpointing=cfg.policy.activation_checkpointing, replay_routing=replay)
        policy = parallel.shard(policy, dtype=cfg.policy.dtype)  # before the next load: rank 0 holds one whole model
        reference = None
        if cfg.loss.kl_coef and cfg.policy.lora.on and not cfg.policy.reference:
            reference = Start(policy)
        elif cfg.loss.kl_coef:
            frozen = load_to_shard(cfg.policy.reference or cfg.policy.path, parallel, cfg.policy)
            check_head(frozen, cfg.loss.inputs)
            check_reference(cfg, model.config.vocab_size, frozen.config.vocab_size)
            reference = parallel.shard(Policy(frozen.requires_grad_(False)), dtype=cfg.policy.dtype)
        ppo = Ppo.from_config(cfg, parallel)
        inputs = parallel.on_main(lambda: run_inputs(cfg, stages, eval_examples))
        claim_run_dir(Path(cfg.run_dir), cfg, parallel.is_main, TRAIN.allowed, inputs, TRAIN.contents)
        return cls(
            cfg=cfg,
            parallel=parallel,
            schema=schema,
            tokenizer=tokenizer,
            form=form,
            policy=policy,
            reference=reference,
            optimizer=make_optimizer(policy.parameters(), cfg.optimizer),
            engine=engine,
            params=params,
            judge=judge,
            sampler=sampler,
            eval_examples=eval_examples,
            objective=Objective.from_config(cfg.loss, cfg.rollout),
            ppo=ppo,
        )

    def resume(self) -> State:
        """Load the last complete checkpoint and return its state; a new state if there is no checkpoint. Collective.

        Raises UserError if checkpoint or logs are not as they were written, before anything of the folder is changed.
        """
        torch.manual_seed(derive_seed(self.cfg.seed, self.parallel.rank))
        checkpoint = latest_checkpoint(self.run_dir / "checkpoints")
        state = State()
        if checkpoint is not None:
            extra = load_checkpoint(checkpoint, self.policy, self.optimizer, self.parallel)
            torch.set_rng_state(extra.pop("torch_rng"))
            if self.ppo is not None:
                self.ppo.load(extra["step"], self.parallel, checkpoint)
            self.sampler.load_state_dict(extra.pop("sampler"))
            before, now = extra.pop("impl", None), self.loss_impl
            if self.cfg.loss.impl == "auto":  # a named kernel is the user's choice
                check_impl(before, now, f", or set loss.impl to {now!r} to go on with other roundings")
            best = extra.pop("best", None)  # absent in checkpoints from before train.best
            state = State(**extra, best=None if best is None else Best(**best))
        best = self.parallel.on_main(lambda: self._best(state))
        changes = TRAIN if self.ppo is not None else replace(TRAIN, recorded=TRAIN.recorded[:2])
        keep, protected = self.cfg.train.keep_checkpoints, _steps(best)
        self.parallel.on_main(lambda: check_resume(self.cfg, checkpoint, state.step, changes, keep, protected))
        return replace(state, best=best)

    def _best(self, state: State) -> Best | None:
        """The best evaluation of the run that goes on; for a `train.best` that is new, from the logs. Rank 0 calls it."""
        name, log = self.cfg.train.best, self.run_dir / "metrics.jsonl"
        if not name or (state.best is not None and state.best.metric == name):
            return state.best if name else None
        rows = [row for row in read_metrics(log) if row["step"] <= state.step] if log.is_file() else []
        best = best_of(rows, name, checkpoints(self.run_dir / "checkpoints"))
        if any("eval/num_examples" in row for row in rows):
            found = "has no checkpoint" if best is None else f"with a checkpoint is that of step {best.step}"
            print(f"train.best is {name!r} from now on; the best evaluation so far {found}", flush=True)
        return best

    def save(self, state: State, sampler_state: dict[str, Any], logger: MetricsLogger | None) -> None:
        """Write a checkpoint for `resume`, after the metrics up to this step are on the disk. Collective.

        sampler_state: the state that the sampler must have at the start of the next step.
        """
        logs = None if logger is None else logger.sync()
        if self.ppo is not None:
            self.ppo.save(state.step, self.parallel, _steps(state.best))
        folder, keep = self.run_dir / "checkpoints", self.cfg.train.keep_checkpoints
        extra = state.to_dict(sampler_state) | {"impl": self.loss_impl}
        save_checkpoint(
            folder, state.step, self.policy, self.optimizer, extra, self.parallel, keep, logs, protected=_steps(state.best)
        )
        if isinstance(self.judge, GenerativeJudge):
            self.judge.cache.clear()  # as after a resume: which questions are computed together decides their last bits

    def save_policies(self, state: State) -> None:
        """Write `policy`, the last one, and, with `train.best`, `policy-best`, whose parameters the policy has then. Collective.

        Prints which step is the best. Raises UserError if its checkpoint is damaged or missing.
        """
        save_policy(self.policy, self.tokenizer, self.run_dir / "policy", self.files)
        name, best, folder = self.cfg.train.best, state.best, self.run_dir / "policy-best"
        if best is None:
            text = f"no evaluation by {name} has a checkpoint, so {folder} is not written" if name else ""
        else:
            if best.step != state.step:
                path = self.run_dir / "checkpoints" / f"step_{best.step:06d}"
                load_parameters(path, self.policy, self.parallel, 'restore it, or set train.best to "" to end without it')
            save_policy(self.policy, self.tokenizer, folder, self.files)
            text = f"best {name}: {best.value:.4f} at optimizer step {best.step}, in {folder}"
        if self.parallel.is_main and text:
            print(text, flush=True)

    def open_logger(self, step: int) -> MetricsLogger | None:
        """Rank 0's log of a run that continues from `step`, truncated to it; None on other ranks."""
        if not self.parallel.is_main:
            return None
        return MetricsLogger(
            self.run_dir,
            resume_step=step or None,
            tensorboard=self.cfg.train.tensorboard,
            wandb=self.cfg.train.wandb,
            trackio=self.cfg.train.trackio,
            config=asdict(self.cfg),
        )


@dataclass(frozen=True)
class State:
    """The part of a checkpoint that is neither parameters nor optimizer.

    All randomness is drawn from (seed, step, rank). Torch's global generator is saved too, in case a model uses dropout.
    """

    step: int = 0  # optimizer steps done
    empty_steps: int = 0  # number of last steps in a row without a group in the difficulty window
    audit: dict[str, Any] | None = None  # error rates of the judge so far (`srpo.rewards.audit`)
    best: Best | None = None  # by train.best; None without it, and before the first evaluation

    def after(self, credit: Credit, window: SamplerConfig, audit: dict[str, Any] | None = None) -> State:
        """The state after one more step. Raises UserError if the last MAX_EMPTY_STEPS steps had no group in the window."""
        empty = 0 if credit.num_in_window else self.empty_steps + 1
        if empty >= MAX_EMPTY_STEPS:
            scores = sorted(credit.group_scores.values())
            raise UserError(
                f"no group has been in the difficulty window ({window.difficulty_low}, {window.difficulty_high}) for "
                f"{empty} steps; the last scores run from {scores[0]:.3f} to {scores[-1]:.3f}. Widen sampler.difficulty_low and "
                "difficulty_high, or start from a policy that is neither always wrong nor always right"
            )
        return State(self.step + 1, empty, audit, self.best)

    def evaluated(self, metrics: Mapping[str, float], name: str) -> State:
        """The state after an evaluation at this step, whose score `name` (train.best) is in `metrics`."""
        return replace(self, best=evaluated(self.best, name, self.step, metrics[name])) if name else self

    def to_dict(self, sampler: dict[str, Any]) -> dict[str, Any]:
        """Plain values for this rank's checkpoint, with the state of the sampler."""
        best = None if self.best is None else vars(self.best)
        return {**vars(self), "best": best, "sampler": sampler, "torch_rng": torch.get_rng_state()}


def _steps(best: Best | None) -> tuple[int, ...]:
    """The optimizer steps whose checkpoints are kept beyond `train.keep_checkpoints`."""
    return () if best is None else (best.step,)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from numbers: equal numbers give equal seeds, different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Clock:
    """Seconds spent in each phase of one optimizer step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self, engine: Engine) -> dict[str, float]:
        """The `time/*` metrics."""
        laps = {f"time/{phase}_s": seconds for phase, seconds in self._laps.items()}
        return laps | {
            "time/step_s": time.perf_counter() - self._start,
            "time/rollout_tokens_per_s": engine.stats()["tokens_per_s"],
        }
