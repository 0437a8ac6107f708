"""All metric keys of the project, and the logger that writes them.

`metrics.jsonl` never depends on the clock, so that a killed and resumed run writes the same bytes as an uninterrupted one.
Metrics that depend on the clock or on a process's cache (`time/*`, `service/*`) go to `timing.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, SupportsFloat

from srpo.core.errors import MissingPackage, UserError, naming
from srpo.core.files import write_whole
from srpo.core.jsonl import json_object
from srpo.core.logs import CHANGES, LogDigests, Written

# {step} is the name of a reasoning step, {class} the number of a grade, {phase} a phase of the loop. docs/metrics.md repeats
# this table; a test compares them.
METRICS: dict[str, str] = {
    "reward/total": "sum of a response's step rewards (Eq. 5), mean over responses",
    "reward/total_std": "sum of a response's step rewards, standard deviation over all responses of the optimizer step",
    "reward/step/{step}": "reward of the reasoning step, mean over responses",
    "reward/missing_frac": "fraction of the steps left to the judge that got no verdict",
    "judge/error_rate/{step}": "audit: fraction of the judge's verdicts on the step that contradict its gold label",
    "judge/false_correct_rate/{step}": "audit: fraction of the wrong answers to the step that the judge accepts (reward hacking)",
    "judge/num_audited/{step}": "audit: number of verdicts on the step that were compared with a gold label",
    "judge/drift/{step}": "audit: averaged error rate on the step minus that of the first reward.audit_warmup optimizer steps",
    "advantage/abs_mean": "|advantage| after normalization and clipping, mean over the tokens trained on",
    "advantage/clip_frac": "fraction of the tokens trained on whose advantage was clipped to +-advantage.clip",
    "train/loss": "loss of the update: Eq. 6 in RL, mean cross-entropy per token (nats) in SFT, mean per pair in DPO",
    "train/grad_norm": "global norm of the gradient before clipping",
    "train/lr": "learning rate of the optimizer step",
    "train/num_tokens": "number of tokens in the loss, over all ranks",
    "train/token_accuracy": "SFT: fraction of target tokens that are the policy's most likely token",
    "train/verdict_accuracy": "scalar reward model: fraction of verdicts whose probability is on the correct side of 0.5",
    "critic/loss": "PPO: half the squared error of the critic's values, clipped by critic.value_clip, mean over tokens",
    "critic/grad_norm": "PPO: global norm of the critic's gradient before clipping",
    "critic/lr": "PPO: learning rate of the critic",
    "critic/value": "PPO: the critic's value of a token before this optimizer step's updates, mean over tokens",
    "critic/explained_var": "PPO: 1 - var(return - value) / var(return) over tokens, before this optimizer step's updates",
    "critic/clip_frac": "PPO: fraction of tokens whose value was clipped by critic.value_clip",
    "dpo/accuracy": "DPO: fraction of pairs whose chosen response has the larger implicit reward, beta * log(pi / pi_ref)",
    "dpo/margin": "DPO: implicit reward of the chosen minus that of the rejected response, mean over pairs",
    "dpo/chosen_reward": "DPO: implicit reward of the chosen response, mean over pairs",
    "dpo/rejected_reward": "DPO: implicit reward of the rejected response, mean over pairs",
    "policy/entropy": "entropy of the policy's distribution that ratios are taken on, nats, mean over response tokens",
    "policy/entropy/{step}": "policy/entropy over the tokens of the reasoning step",
    "policy/kl": "KL(policy || reference policy) by loss.kl_estimator, nats, mean over response tokens",
    "policy/kl/{step}": "policy/kl over the tokens of the reasoning step",
    "policy/clip_frac": "fraction of response tokens for which Eq. 6 takes the clipped branch",
    "policy/clip_frac/{step}": "policy/clip_frac over the tokens of the reasoning step",
    "policy/ratio": "importance ratio pi_theta / pi_old, mean over response tokens",
    "policy/ratio/{step}": "policy/ratio over the tokens of the reasoning step",
    "rollout/mismatch_kl": "KL(engine || trainer) by the k3 estimator, nats, mean over sampled tokens",
    "rollout/mismatch_max": "|trainer log-probability - engine log-probability|, nats, largest over sampled tokens",
    "rollout/mismatch_ratio_mean": "trainer's probability of a token before the update / engine's, mean over sampled tokens",
    "rollout/mismatch_ratio_p99": "99th percentile of that ratio over the sampled tokens of all ranks (nearest rank, exact)",
    "rollout/mismatch_ratio_max": "largest value of that ratio over sampled tokens",
    "rollout/importance_clip_frac": "fraction of tokens whose weight loss.importance bounded (truncate) or set to 0 (mask)",
    "rollout/routing_flip_frac": "fraction of (token, layer) pairs whose router would choose other experts than it replays",
    "rollout/response_length": "response length in tokens, mean over responses",
    "rollout/response_length/{step}": "length of the reasoning step in tokens, mean over responses",
    "rollout/prompt_length": "prompt length in tokens, mean over responses",
    "rollout/parse_rate": "fraction of responses with an answer to every step",
    "rollout/truncated_frac": "fraction of responses cut at rollout.max_new_tokens",
    "rollout/num_responses": "number of sampled responses",
    "rollout/num_masked": "number of cut responses in the difficulty window that were kept out of the loss (loss.overlong mask)",
    "rollout/num_groups": "number of sampled groups: prompts with rollout.group_size responses each",
    "rollout/num_groups_in_window": "number of groups trained on: in the window (4.2.1), with sampler.refill of unequal reward",
    "rollout/group_score": "difficulty score of a group, 0 (all wrong) to 1 (all right), mean over groups",
    "rollout/num_cut_groups": "number of prompts whose groups were aborted unfinished (rollout.oversample, rollout.cut_tail)",
    "rollout/num_refill_rounds": "number of extra generation rounds of the optimizer step (sampler.refill)",
    "sampler/stage": "number of the curriculum stage, from 1 (4.2.2)",
    "sampler/in_window_frac": "fraction of the stage's scored examples with an estimated solve rate in the difficulty window",
    "sampler/coverage_frac": "fraction of the stage's examples that the run has scored at least once",
    "sampler/num_skipped": "number of the stage's examples skipped now: a recent estimate is outside the difficulty window",
    "sampler/adversarial_frac": "fraction of the step's prompts whose title carries a fake verdict (data.adversarial_frac)",
    "sampler/num_early": "number of this step's prompts drawn although to be skipped, because too few others were left",
    "eval/macro_f1": "F1 per class, mean over all grades (5.1.2); a class that the pairs lack counts as 0",
    "eval/accuracy": "fraction of verdicts equal to the human grade",
    "eval/majority_accuracy": "accuracy of always answering the most common human grade",
    "eval/top_verdict_frac": "fraction of the readable verdicts that are the most common one; near 1, the policy has collapsed",
    "eval/good_f1": "F1 with the good grades merged into one positive class",
    "eval/class_f1/{class}": "F1 of the class",
    "eval/step_accuracy/{step}": "fraction of correct answers to the reasoning step, over examples with a label for it",
    "eval/parse_rate": "fraction of evaluated responses with an answer to every step",
    "eval/num_examples": "number of evaluated pairs",
    "best/step": "optimizer step of the best evaluation so far by train.best; of equal values the earliest",
    "best/value": "value of train.best at best/step",
    "best/num_stalled": "number of evaluations since best/step; the run ends at train.patience",
    "service/num_calls": "number of texts requested from the generative judge, over all ranks; no cached or repeated ones",
    "service/num_retries": "number of repeated attempts at calls of the judge's server, over all ranks",
    "service/num_failed": "number of calls of the judge's server without a result: missing verdicts (reward.judge_fallback)",
    "service/num_no_text": "number of replies of the generative judge without a text (null, a list, blank): missing verdicts",
    "service/num_too_long": "number of responses that do not fit into the judge's context: missing verdicts",
    "service/cache_hit_frac": "fraction of judged responses whose question was cached or equal to another's",
    "service/busy_s": "wall-clock seconds in which the generative judge was busy, of the slowest rank",
    "time/{phase}_s": "wall-clock seconds of the phase (step: the whole optimizer step)",
    "time/rollout_tokens_per_s": "sampled tokens per second of the rollout phase",
}
# Metrics that train.best may name: the larger, the better.
SCORES = ("eval/macro_f1", "eval/accuracy", "eval/good_f1", "eval/parse_rate", "eval/class_f1/{class}")
SCORES += ("eval/step_accuracy/{step}",)
CLOCK_AREAS = ("time", "service")  # depend on the clock or the process's cache: a resumed run has other numbers
FILES = ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")  # truncated together when a run resumes

_PLACEHOLDERS = {"step": "[a-z][a-z0-9_]*", "class": "(?:[1-9]|10)", "phase": "[a-z_]+"}
_PATTERNS = [
    re.compile("".join(_PLACEHOLDERS[p[1:-1]] if p.startswith("{") else re.escape(p) for p in re.split(r"(\{\w+\})", key)))
    for key in METRICS
    if "{" in key
]


def check_key(key: str) -> None:
    """Raise ValueError if `key` is not in METRICS (with its `{...}` parts filled in)."""
    if key not in METRICS and not any(pattern.fullmatch(key) for pattern in _PATTERNS):
        raise ValueError(
            f"metric {key!r} is not declared: add it with one line of description to METRICS in srpo/core/metrics.py"
        )


def filled(key: str, step_names: Sequence[str], num_grades: int) -> list[str]:
    """The metrics that a key of METRICS stands for: one per reasoning step or grade if it has that placeholder, else itself."""
    for mark, values in (("{step}", step_names), ("{class}", [str(number) for number in range(1, num_grades + 1)])):
        if mark in key:
            return [key.replace(mark, value) for value in values]
    return [key]


def evaluation_metrics(results: Mapping[str, Any], step_names: tuple[str, ...]) -> dict[str, float]:
    """Return the `eval/*` metrics of a dict made by `scores.evaluation.results_dict`; a step accuracy of None has no key."""
    metrics: dict[str, float] = {
        f"eval/{key}": results[key] for key in ("macro_f1", "accuracy", "good_f1", "parse_rate", "num_examples")
    }
    metrics |= {f"eval/class_f1/{grade}": f1 for grade, f1 in enumerate(results["class_f1"], start=1)}
    metrics["eval/majority_accuracy"] = results["majority"]["accuracy"]
    if results["top_verdict"] is not None:
        metrics["eval/top_verdict_frac"] = results["top_verdict"]["share"]
    accuracy = zip(step_names, results["step_accuracy"], strict=True)
    return metrics | {f"eval/step_accuracy/{name}": value for name, value in accuracy if value is not None}


def truncate_jsonl(path: Path, last_step: int | None) -> None:
    """Truncate a file of `{"step": n, ...}` lines, n nondecreasing, to its lines with n <= last_step; None empties it.

    Removes the first later or broken line and all lines after it, a half-written last line included. It is one truncate(2), so a
    kill at any moment leaves the old file or the new one. A file that does not exist is not created.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file if last_step is not None else ():
            step = _line_step(line)
            if step is None or last_step is None or step > last_step:
                break
            end += len(line)
    with naming(path):
        os.truncate(path, end)


def _line_step(line: bytes) -> int | None:
    """Step of a complete line, None for a broken one. Skips the JSON parser if "step" comes first: rollout files are large."""
    if not line.endswith(b"}\n"):
        return None
    if usual := re.match(rb'\{"step": (\d+)[,}]', line):
        return int(usual[1])
    try:
        step = json.loads(line).get("step")
    except (ValueError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `metrics.jsonl` or `timing.jsonl` in order, without a half-written last one (the run may be alive).

    Raises UserError for any other line that is broken.
    """
    rows: list[dict[str, float]] = []
    with naming(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            row = json_object(line, f"{path}, line {number}", "the line that the program wrote")
            if not isinstance(row.get("step"), int):
                raise UserError(f"{path}, line {number} has no step: restore the file")
            rows.append(row)
    return rows


class Tracker(Protocol):
    """An experiment tracker: TensorBoard, W&B or trackio."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsLogger:
    """Writes one line per optimizer step to `metrics.jsonl` and `timing.jsonl` of a run folder, and to the chosen trackers.

    Only rank 0 has a logger. `resume_step` is the step of the checkpoint that the run resumes from: the two files and
    `rollouts.jsonl` are truncated to it; None starts a new run with empty files. Call `logs.check_logs` before.
    Raises MissingPackage, with the pip command, if a chosen tracker is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
        trackio: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._step = resume_step
        for name in FILES:
            truncate_jsonl(self.run_dir / name, resume_step)
        self._digests = LogDigests(self.run_dir, (*FILES, CHANGES))
        self._metrics = (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._timing = (self.run_dir / "timing.jsonl").open("a", encoding="utf-8")
        makers: list[tuple[bool, Callable[..., Tracker]]] = [(tensorboard, _TensorBoard), (wandb, _WandB), (trackio, _Trackio)]
        self._trackers = [maker(self.run_dir, resume_step, dict(config or {})) for wanted, maker in makers if wanted]

    def log(self, step: int, metrics: Mapping[str, SupportsFloat | None]) -> None:
        """Write the line of one optimizer step: `{"step": n, ...}` with sorted keys and exact numbers.

        Values are numbers or one-element tensors and arrays. None omits the key; NaN and infinity become null.
        Raises ValueError for a key that METRICS lacks, and for a step that is not after the last one.
        """
        if self._step is not None and step <= self._step:
            raise ValueError(f"step {step} is logged after step {self._step}: log each optimizer step once, in order")
        numbers = {key: _number(value) for key, value in sorted(metrics.items()) if value is not None}
        for key in numbers:
            check_key(key)
        self._step = step
        for file, timing in ((self._metrics, False), (self._timing, True)):
            line = {key: _finite(value) for key, value in numbers.items() if (key.partition("/")[0] in CLOCK_AREAS) == timing}
            if line or not timing:
                with naming(Path(file.name)):
                    file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
                    file.flush()
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def sync(self) -> dict[str, Written]:
        """Bring the files to the disk. Returns what a checkpoint stores of them; call it before saving one."""
        return self._digests.sync()

    def close(self) -> None:
        """Close the files and the trackers."""
        self._metrics.close()
        self._timing.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _number(value: SupportsFloat) -> float:
    """The Python int or float equal to `value`."""
    item = getattr(value, "item", None)  # tensors and arrays have it
    number = item() if item is not None else value
    return int(number) if isinstance(number, int) else float(number)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tracker_module(name: str, package: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f"train.{package} is on but {package} is not installed: pip install {package}") from error


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None, config: dict[str, Any]) -> None:
        module = _tracker_module("torch.utils.tensorboard", "tensorboard")
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Keeps the W&B run id in the run folder, so that a resumed run continues the same W&B run."""

    def __init__(self, run_dir: Path, resume_step: int | None, config: dict[str, Any]) -> None:
        id_file = run_dir / "wandb_id.txt"
        if resume_step is None or not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex)
        module = _tracker_module("wandb", "wandb")
        self._run = module.init(
            project="srpo", name=run_dir.name, id=id_file.read_text(), resume="allow", dir=str(run_dir), config=config
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run_dir: Path, resume_step: int | None, config: dict[str, Any]) -> None:
        module = _tracker_module("trackio", "trackio")
        resume = "never" if resume_step is None else "allow"
        self._run = module.init(project="srpo", name=run_dir.name, config=config, resume=resume)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()
