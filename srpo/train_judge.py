"""Training of the step judge R_phi (4.3.1, 5.1.6): `python -m srpo.train_judge @ my.toml`.

A stage is skipped if its result exists:

    sft   SFT on (pair, response, verdicts, reasons) in the form of Figure 4; evaluated per step as in Table 2   sft/, sft.json
    mine  hard cases by the judge's sampled verdicts, as a queue for human verification                          judge_queue.jsonl
    grpo  GRPO on the verified cases with the trainer of the policy; evaluated again                             grpo/, grpo.json

Judgments are JSON Lines of `{"example_id": ..., "response": ..., "verdicts": [true, false, null, ...], "reasons": [...]}`, one
entry per step, null for a step without a judgment; reasons are optional. On the catalogue world a simulated annotator writes
judgments: `--rollouts runs/demo/rollouts.jsonl` judges the responses that a run has sampled. It then verifies the queue, too.

With human judgments the program stops after mining: fill in the field "human" of the queue, then continue with `--verified FILE`.
`--kind scalar` trains the scalar reward model of Appendix A on the same judgments instead, which has only the first stage.
"""

from __future__ import annotations

from srpo.core.config.judge import JudgeConfig
from srpo.core.errors import UserError
from srpo.core.settings import check_command_line, run_program

if __name__ == "__main__":
    check_command_line(JudgeConfig)  # -h and mistakes answer before torch is imported

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from srpo.core.digests import digest_of, digest_of_bytes, digest_of_file
from srpo.core.files import read_result, whole_file, write_result
from srpo.core.run_dir import claim_run_dir
from srpo.core.run_lock import locks_run_dir
from srpo.data.pairs import write_pairs
from srpo.data.readers import write_examples
from srpo.judge_training.evaluation import judge_table, reliability_table
from srpo.judge_training.hard_cases import case_example, mine
from srpo.judge_training.human_queue import fill_in, queue_lines, read_queue, verified_cases
from srpo.judge_training.inputs import QUEUE, Work, judge_inputs, prepare, simulates
from srpo.judge_training.judgments import as_rollout
from srpo.judge_training.scalar import train_scalar
from srpo.judge_training.stages import evaluate_judge, grpo_config, load_judge, vote_on
from srpo.policy.parallel import Parallel, distributed
from srpo.rewards.guidelines import keep_guidelines
from srpo.rewards.judge import GenerativeJudge, OracleJudge
from srpo.rewards.verdicts import judge_prompt, render_verdicts
from srpo.sft import sft
from srpo.train import train
from srpo.training.changes import SUPERVISED, TRAIN

# Settings that may change between stages; they are not part of the run folder's identity.
LATER = ("stage", "verified", "unverified", "simulate_human", "human_error_rate", "mine", "grpo")


@locks_run_dir
def train_judge(cfg: JudgeConfig, parallel: Parallel) -> dict[str, Any]:
    """Run the stages of `cfg.stage`. Returns the contents of `judge.json`: counts, and scores of each finished stage. Collective.

    `run_dir/policy` becomes a link to the judge of the last finished stage. Raises UserError for settings and data that would
    fail later, before anything is written.
    """
    work = prepare(cfg, parallel)
    claimed = replace(cfg, **{key: getattr(JudgeConfig(), key) for key in LATER})
    inputs = parallel.on_main(lambda: judge_inputs(work))
    free = [f"sft.{key}" for key in SUPERVISED.free]
    claim_run_dir(work.run_dir, claimed, parallel.is_main, free, inputs)
    parallel.barrier()
    stages = ("sft", "mine", "grpo") if cfg.stage == "all" else (cfg.stage,)
    if "sft" in stages:
        run_sft(work)
    if cfg.kind == "generative" and "mine" in stages:
        run_mine(work)
    if cfg.kind == "generative" and "grpo" in stages:
        if cfg.verified or simulates(cfg):
            run_grpo(work)
        elif parallel.is_main:
            print(f'fill in "human" in a copy of {work.run_dir / QUEUE}, then continue with --stage grpo --verified FILE')
    return report(work)


# ---- the stages ----------------------------------------------------------------------------------------------------------------


def run_sft(work: Work) -> None:
    """Train the first stage and write its scores on held-out judgments to sft.json."""
    if work.is_done("sft.json"):
        return
    cfg, folder = replace(work.cfg.sft, run_dir=str(work.run_dir / "sft")), work.run_dir / "sft"
    if work.cfg.kind == "scalar":
        path = train_scalar(cfg, work.shown, work.examples, work.schema, work.parallel)
    else:
        data = work.run_dir / "judge_sft.jsonl"
        if work.parallel.is_main:
            texts = (
                (judge_prompt(work.examples[j.example_id], j.response, work.guidelines), render_verdicts(j.verdicts, j.reasons))
                for j in work.shown
            )
            write_pairs(data, texts)
        work.parallel.barrier()
        path = sft(replace(cfg, data=str(data)), work.parallel, _judge_files(work, folder))
    assert path == folder / "policy"
    _evaluate(work, "sft", path)


def run_mine(work: Work) -> None:
    """Write the queue of hard cases, in the order in which people should verify them, and its counts to mine.json.

    Raises UserError if no case is hard enough, or if the queue was made with other settings.
    """
    cfg, settings = work.cfg.mine, json.loads(json.dumps(asdict(work.cfg.mine)))
    pool = digest_of(work.pool)
    if work.is_done(QUEUE):
        path, queue = work.run_dir / "mine.json", work.run_dir / QUEUE
        made = read_result(path) if path.is_file() else {}
        if made.get("settings", settings) != settings:
            raise UserError(f"{queue} was made with other mine.* settings ({path}): restore those, or remove the queue")
        if made.get("pool", pool) != pool:
            raise UserError(
                f"{queue} was made of other responses than {cfg.pool or 'the judgments'} has now: restore them, or remove it"
            )
        if made.get("queue") != digest_of_file(queue):
            raise UserError(f"{queue} is damaged, or belongs to another {path}: remove both, then they are made again")
        return
    judge = _judge(work, work.run_dir / "sft" / "policy")
    assert isinstance(judge, GenerativeJudge)
    cases = vote_on(judge, work.pool, work.examples, work.schema, cfg.num_votes, work.cfg.sft.seed, work.parallel)
    chosen, numbers = mine(cases, work.examples, work.schema, cfg.num_cases, cfg.solve_low, cfg.solve_high, cfg.balance)
    if not chosen:
        raise UserError(
            f"{numbers['num_hard']} of {numbers['num_responses']} responses are hard cases, none of them inside the window: "
            "mine other responses (--mine.pool), or widen mine.solve_low and mine.solve_high"
        )
    lines = queue_lines(chosen, work.examples, work.schema)
    work.write_result("mine.json", numbers | {"settings": settings, "pool": pool, "queue": digest_of_bytes(lines.encode())})
    work.write(QUEUE, lines)
    if work.parallel.is_main:
        print(f"{len(chosen)} hard cases of {len(cases)} responses in {work.run_dir / QUEUE}")


def run_grpo(work: Work) -> None:
    """Train the second stage and write its scores to grpo.json. Raises UserError if it began with other verdicts or settings."""
    cfg, run_dir, schema = work.cfg, work.run_dir, work.schema
    done = work.is_done("grpo.json") and work.is_done("grpo/config.toml")
    verified = Path(cfg.verified) if cfg.verified else run_dir / "judge_verified.jsonl"
    queue = read_queue(run_dir / QUEUE, schema).values()
    if unknown := next((line for line in queue if line.example_id not in work.examples), None):
        raise UserError(f"{unknown.where}: example_id {unknown.example_id!r} is not in {cfg.data}: restore the queue or the data")
    if not (cfg.verified or done):
        human = OracleJudge(cfg.human_error_rate, cfg.sft.seed + 1, schema)
        judged = human.judge(
            [as_rollout(line.example_id, line.response, schema) for line in queue],
            [work.examples[line.example_id] for line in queue],
        )
        plain = [[None if v is None else bool(v) for v in verdicts] for verdicts in judged]
        work.write(verified.name, fill_in((run_dir / QUEUE).read_text(encoding="utf-8"), plain))
    chosen, numbers = verified_cases(run_dir / QUEUE, verified, schema, cfg.unverified)
    data = run_dir / "grpo_cases.jsonl"
    if work.parallel.is_main:
        cases = (
            case_example(i, work.examples[line.example_id], line.response, right, work.guidelines)
            for i, (line, right) in chosen.items()
        )
        fresh = data.with_name("grpo_cases.new.jsonl")
        write_examples(fresh, cases)
        if (run_dir / "grpo" / "config.toml").is_file() and fresh.read_bytes() != data.read_bytes():
            raise UserError(f"{run_dir / 'grpo'} has begun with other verdicts ({data}): restore those, or remove that folder")
        if done:
            fresh.unlink()
        else:
            fresh.replace(data)
        if not (done and (run_dir / "verified.json").is_file()):
            write_result(run_dir / "verified.json", numbers)
            print(", ".join(f"{count} {name.removeprefix('num_').replace('_', ' ')}" for name, count in numbers.items()))
    work.parallel.barrier()
    policy = replace(cfg.sft.policy, path=str(run_dir / "sft" / "policy"), reference="")
    if cfg.sft.policy.lora.on:  # one adapter of the first stage's base, which goes on training
        lora = replace(cfg.sft.policy.lora, start=str(run_dir / "sft" / "adapter"), targets=())
        policy = replace(cfg.sft.policy, reference="", lora=lora)
    settings = grpo_config(
        cfg.grpo,
        run_dir=run_dir / "grpo",
        data=data,
        policy=policy,
        schema=schema,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.sft.seed,
    )
    if done:
        claim_run_dir(run_dir / "grpo", settings, work.parallel.is_main, TRAIN.free)
    else:
        _evaluate(work, "grpo", train(settings, work.parallel, _judge_files(work, run_dir / "grpo")))


def _judge_files(work: Work, folder: Path) -> dict[str, str]:
    return work.parallel.on_main(lambda: keep_guidelines(folder, work.guidelines))


def _judge(work: Work, path: Path) -> Any:
    cfg = work.cfg
    return load_judge(cfg.kind, path, work.schema, cfg.max_new_tokens, cfg.sft.policy, work.parallel, work.guidelines)


def _evaluate(work: Work, stage: str, path: Path) -> None:
    """Write the scores of a stage to `<stage>.json` and point the link `policy` at its judge."""
    cfg, judge = work.cfg, _judge(work, path)
    scores = evaluate_judge(judge, work.held_out, work.examples, work.schema, cfg.num_votes, cfg.sft.seed, work.parallel)
    if work.parallel.is_main:
        with whole_file(work.run_dir / "policy") as link:
            link.symlink_to(path.relative_to(work.run_dir), target_is_directory=True)
    work.write_result(f"{stage}.json", scores)


def report(work: Work) -> dict[str, Any]:
    """Collect the files of the stages in `judge.json` and print its tables. Returns its contents."""
    result: dict[str, Any] = {
        "num_judgments": len(work.shown),
        "num_held_out": len(work.held_out),
        "num_left_out": work.num_left_out,
        "steps": list(work.schema.names),
    }
    for name in ("sft", "mine", "verified", "grpo"):
        path = work.run_dir / f"{name}.json"
        if path.is_file():
            result[name] = read_result(path)
    work.write("judge.json", json.dumps(result, indent=1) + "\n")
    scores = {stage: result[stage] for stage in ("sft", "grpo") if stage in result}
    if scores and work.parallel.is_main:
        print(judge_table(scores))
        last = next(reversed(scores))
        print(f"\nsteps that are correct, by the confidence with which the judge ({last}) calls them so:")
        print(reliability_table(scores[last]))
    return result


main = distributed(train_judge)


if __name__ == "__main__":
    run_program(main, JudgeConfig)
