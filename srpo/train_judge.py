"""The generative step judge R_phi (4.3.1), first stage: SFT on (pair, response, verdicts). `python -m srpo.train_judge @ x.toml`.

Judgments are JSON Lines of `{"example_id": ..., "response": ..., "verdicts": [true, false, null, ...], "reasons": [...]}`, one
entry per step, null where nobody judged; reasons are optional. On the catalogue world a simulated annotator writes them:
`--rollouts runs/demo/rollouts.jsonl` judges the responses that a run has sampled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from srpo.batch import Rollout
from srpo.data.examples import Example
from srpo.data.readers import load_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.evaluate import load_rollouts
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel, init_parallel
from srpo.rewards.judge import GenerativeJudge, OracleJudge
from srpo.rewards.verdicts import judge_prompt, render_verdicts
from srpo.rollout.judging import open_judge
from srpo.run_dir import write_whole
from srpo.settings import run_program
from srpo.sft import SftConfig, sft, write_pairs
from srpo.steps import PAPER_STEPS, StepSchema, StepSpec


@dataclass(frozen=True)
class JudgeConfig:
    """`python -m srpo.train_judge --data train.jsonl --judgments judged.jsonl --sft.policy.path base`"""

    run_dir: str = "runs/judge"
    data: str = ""  # the examples that the judgments speak of
    judgments: str = ""  # JSON Lines, see above
    rollouts: str = ""  # instead of judgments: a rollouts.jsonl, judged by a simulated annotator (needs truths, as the world has)
    annotator_error_rate: float = 0.0  # of the simulated annotator
    max_new_tokens: int = 256  # of the verdicts on one response
    held_out: int = 200  # the last so many judgments measure the judge instead of training it
    steps: tuple[StepSpec, ...] = PAPER_STEPS
    sft: SftConfig = field(default_factory=lambda: SftConfig(num_steps=500))


@dataclass(frozen=True)
class Judgment:
    """One response with what an annotator said of each of its steps."""

    example_id: str
    response: str
    verdicts: tuple[bool | None, ...]  # [J]
    reasons: tuple[str | None, ...]  # [J]


def read_judgments(path: str | Path, num_steps: int) -> Iterator[Judgment]:
    """The judgments of a file. ValueError with file and line for one that is malformed."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _judgment(line, f"{path}, line {number}", num_steps)


def _judgment(line: bytes, where: str, num_steps: int) -> Judgment:
    try:
        row = json.loads(line)
        example_id, response, verdicts = row["example_id"], row["response"], row["verdicts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: want {{"example_id": ..., "response": ..., "verdicts": [true, ...]}} ({error})') from error
    if not isinstance(response, str):
        raise ValueError(f"{where}: response is {response!r}: give the text that was judged")
    if not (
        isinstance(verdicts, list) and len(verdicts) == num_steps and all(v is None or isinstance(v, bool) for v in verdicts)
    ):
        raise ValueError(f"{where}: verdicts is {verdicts!r}: give {num_steps} of true, false or null, one per step")
    reasons = row.get("reasons") or [None] * num_steps
    if not (isinstance(reasons, list) and len(reasons) == num_steps and all(r is None or isinstance(r, str) for r in reasons)):
        raise ValueError(f"{where}: reasons is {reasons!r}: give {num_steps} texts, one per step, null where there is none")
    return Judgment(str(example_id), response, tuple(verdicts), tuple(reasons))


def simulate_judgments(
    rollouts: Iterable[Rollout], examples: dict[str, Example], schema: StepSchema, error_rate: float, seed: int
) -> list[Judgment]:
    """What a simulated annotator says of sampled responses, each different response once."""
    unique = list({(r.example_id, r.text): r for r in rollouts if r.example_id in examples}.values())
    verdicts = OracleJudge(error_rate, seed, schema).judge(unique, [examples[r.example_id] for r in unique])
    nothing = (None,) * schema.num_steps
    return [Judgment(r.example_id, r.text, v, nothing) for r, v in zip(unique, verdicts, strict=True)]


def step_agreement(judge: GenerativeJudge, judgments: Sequence[Judgment], examples: dict[str, Example]) -> list[float | None]:
    """Share of an annotator's verdicts on each step that the judge repeats, [J] (Table 2); None where the annotator gave none.

    No verdict of the judge is a disagreement.
    """
    rollouts = [
        Rollout(j.example_id, i, (), (), (), (0,) * len(j.verdicts), (None,) * len(j.verdicts), j.response, "stop", 0)
        for i, j in enumerate(judgments)
    ]
    told = judge.judge(rollouts, [examples[j.example_id] for j in judgments])
    agreement: list[float | None] = []
    for step in range(len(judgments[0].verdicts)):
        pairs = [(said[step], j.verdicts[step]) for said, j in zip(told, judgments, strict=True) if j.verdicts[step] is not None]
        agreement.append(sum(a == b for a, b in pairs) / len(pairs) if pairs else None)
    return agreement


def train_judge(cfg: JudgeConfig, parallel: Parallel) -> dict[str, Any]:
    """Train R_phi into `run_dir/policy` and return `judge.json`: its agreement with the held-out judgments, per step."""
    schema, run_dir = StepSchema(cfg.steps), Path(cfg.run_dir)
    if not cfg.data:
        raise ValueError("data is not set: name the examples that the judgments speak of")
    if bool(cfg.judgments) == bool(cfg.rollouts):
        raise ValueError("set one of judgments (human verdicts) and rollouts (to be judged by the simulated annotator)")
    examples = {e.example_id: e for e in load_examples(cfg.data, schema.num_steps)}
    if cfg.judgments:
        judgments = list(read_judgments(cfg.judgments, schema.num_steps))
    else:
        judgments = simulate_judgments(
            load_rollouts(Path(cfg.rollouts)), examples, schema, cfg.annotator_error_rate, cfg.sft.seed
        )
    if unknown := [j.example_id for j in judgments if j.example_id not in examples]:
        raise ValueError(f"{len(unknown)} judgments speak of examples that are not in {cfg.data}, the first of {unknown[0]}")
    judgments = [j for j in judgments if any(verdict is not None for verdict in j.verdicts)]
    if len(judgments) <= cfg.held_out:
        raise ValueError(
            f"{len(judgments)} judgments have a verdict and held_out is {cfg.held_out}, which leaves none to train on: "
            "lower held_out, or judge more responses (the simulated annotator needs examples with a truth)"
        )
    shown, held_out = judgments[: -cfg.held_out or None], judgments[-cfg.held_out :] if cfg.held_out else []
    if parallel.is_main:
        texts = ((judge_prompt(examples[j.example_id], j.response), render_verdicts(j.verdicts, j.reasons)) for j in shown)
        write_pairs(run_dir / "judge_sft.jsonl", texts)
    parallel.barrier()
    path = sft(replace(cfg.sft, run_dir=str(run_dir), data=str(run_dir / "judge_sft.jsonl")), parallel)
    report: dict[str, Any] = {"num_judgments": len(shown), "num_held_out": len(held_out), "steps": [s.name for s in cfg.steps]}
    if parallel.is_main:
        if held_out:
            model = nn.Module.to(load_policy(path), parallel.device)
            judge = open_judge(model, load_tokenizer(path), schema, cfg.max_new_tokens)
            report |= {"agreement": step_agreement(judge, held_out, examples), **judge.stats()}
        write_whole(run_dir / "judge.json", json.dumps(report, indent=1) + "\n")
    return report


def main(cfg: JudgeConfig) -> None:
    """The program."""
    parallel = init_parallel()
    try:
        report = train_judge(cfg, parallel)
        for name, share in zip(report["steps"], report.get("agreement", ()), strict=False):
            agrees = "no held-out verdict" if share is None else f"{100 * share:.1f} % of held-out verdicts repeated"
            print(f"{name}: {agrees}")
    finally:
        parallel.close()


if __name__ == "__main__":
    run_program(main, JudgeConfig)
