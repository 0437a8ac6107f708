from __future__ import annotations

import math
import re
import shutil
import statistics
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch
from transformers import AutoModelForCausalLM

import srpo.train
import srpo.training.run
from srpo.core.batch import read_rollouts
from srpo.core.config.train import Config
from srpo.core.metrics import check_key
from srpo.core.settings import run_program
from srpo.data.readers import write_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.data.world import World
from srpo.policy.model import Policy, load_policy, make_tiny, save_policy
from srpo.policy.parallel import Parallel
from srpo.train import pack_own, policy_update, train
from srpo.training.collect import sample
from srpo.training.credit import Credit, assign_credit
from srpo.training.run import Run
from srpo.training.update import NonFiniteError, read_dump, update


def run(cfg: Config) -> list[dict[str, float]]:
    """The metrics of a whole run."""
    assert train(cfg, small.ONE) == Path(cfg.run_dir) / "policy"
    return small.metrics_of(Path(cfg.run_dir))


@pytest.fixture(scope="module")
def two_steps(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps with evaluation."""
    folder = tmp_path_factory.mktemp("two_steps") / "run"
    train(world.config(folder, num_steps=2, data={"eval": str(world.eval)}, train={"eval_every": 1}), small.ONE)
    return folder


def test_a_run_leaves_what_its_page_says(world: Any, two_steps: Path) -> None:
    files = {path.name for path in two_steps.iterdir()}
    assert files == {"config.toml", "inputs.json", "metrics.jsonl", "timing.jsonl", "rollouts.jsonl", "policy", "checkpoints"}
    policy = AutoModelForCausalLM.from_pretrained(two_steps / "policy", attn_implementation="sdpa")
    before = small.parameters_of(world.policy)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys()  # every expert was reached


def test_metrics_are_declared_finite_and_sane(two_steps: Path) -> None:
    lines = small.metrics_of(two_steps)
    assert [line.pop("step") for line in lines] == [1, 2]
    for line in lines:
        for key, value in line.items():
            check_key(key)
            assert value is not None and math.isfinite(value), key
            assert not key.startswith("time/"), key
        assert 0 <= line["reward/total"] <= 1.8 and 0 < line["rollout/parse_rate"] <= 1
        assert line["rollout/num_responses"] == 16 and line["rollout/num_groups"] == 4
        assert 0 < line["rollout/num_groups_in_window"] <= 4
        assert line["policy/ratio"] == pytest.approx(1.0) and line["policy/clip_frac"] == 0
        assert 0 < line["policy/entropy"] < math.log(100)
        assert 0 < line["train/num_tokens"] <= line["rollout/response_length"] * 16
        assert line["eval/num_examples"] == 12
    assert lines[0]["policy/kl"] == 0 < lines[1]["policy/kl"]
    assert [line["train/lr"] for line in lines] == pytest.approx([5e-4, 1e-4])


def test_the_engine_samples_what_the_trainer_computes(two_steps: Path) -> None:
    for line in small.metrics_of(two_steps):
        assert abs(line["rollout/mismatch_kl"]) < 1e-6
        assert line["rollout/mismatch_max"] < 1e-3


def test_rollouts_are_logged_whole(two_steps: Path) -> None:
    rows = list(read_rollouts(two_steps / "rollouts.jsonl"))
    assert [step for step, _ in rows] == [1] * 16 + [2] * 16
    assert [r.group for _, r in rows] == [g for _ in range(2) for g in range(4) for _ in range(4)]
    line = small.metrics_of(two_steps)[0]
    first = [r for step, r in rows if step == 1]
    assert line["reward/total"] == pytest.approx(statistics.mean(sum(r.step_rewards or ()) for r in first))
    assert all(r.policy_version == step - 1 for step, r in rows)
    for _, r in rows:
        assert len(r.step_ends) == 5 and r.step_ends[-1] == len(r.response_ids) == len(r.sampling_logprobs) <= 64
        assert len({other.prompt_ids for _, other in rows if other.example_id == r.example_id}) == 1


def test_a_finished_run_started_again_changes_nothing(world: Any, two_steps: Path) -> None:
    names = ("metrics.jsonl", "rollouts.jsonl", "config.toml")
    before = [(two_steps / name).read_bytes() for name in names], small.parameters_of(two_steps / "policy")
    train(world.config(two_steps, num_steps=2, data={"eval": str(world.eval)}, train={"eval_every": 1}), small.ONE)
    assert [(two_steps / name).read_bytes() for name in names] == before[0]
    assert small.same_bits(small.parameters_of(two_steps / "policy"), before[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": {"normalize": "group"}},
        {"advantage": {"normalize": "group_step"}},
        {"advantage": {"normalize": "none", "clip": 0.0}},
        {"advantage": {"gamma": 0.0}},
        {"advantage": {"method": "grpo"}},
        {"advantage": {"method": "grpo_step_sum"}},
        {"loss": {"kl_estimator": "k1"}},
        {"loss": {"kl_estimator": "k2", "denominator": "token_mean"}},
        {"loss": {"kl_estimator": "full"}},
        {"loss": {"kl_coef": 0.0}},
        {"loss": {"num_updates": 2, "clip_eps_low": 1e-5, "clip_eps_high": 1e-5}, "optimizer": {"warmup_steps": 0}},
        {"loss": {"num_updates": 2, "kl_estimator": "full"}, "rollout": {"ratio": "unfiltered"}},
        {"rollout": {"ratio": "unfiltered"}},
        {"rollout": {"top_k": 0, "temperature": 1.3}},
        {"rollout": {"group_size": 1, "num_prompts": 16}, "sampler": {"difficulty_high": 2.0, "balance": "grade"}},
        {"sampler": {"difficulty_score": "final", "balance": "query_type"}},
        {"policy": {"experts": "loop", "activation_checkpointing": True}},
    ],
    ids=lambda changes: " ".join(f"{section}.{key}={value}" for section, keys in changes.items() for key, value in keys.items()),
)
def test_every_reading_takes_a_step(world: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    (line,) = run(world.config(tmp_path, **{"num_steps": 1, **changes}))
    assert math.isfinite(line["train/loss"]) and line["train/grad_norm"] > 0
    assert abs(line["rollout/mismatch_kl"]) < 1e-6
    assert not small.same_bits(small.parameters_of(tmp_path / "policy"), small.parameters_of(world.policy))
    if changes.get("loss", {}).get("num_updates") == 2 and "clip_eps_low" in changes["loss"]:
        assert line["policy/clip_frac"] > 0  # the second update is off-policy


def test_bfloat16_forward_keeps_fp32_weights(world: Any, tmp_path: Path) -> None:
    try:
        (line,) = run(world.config(tmp_path, num_steps=1, policy={"dtype": "bfloat16"}))
    finally:
        small.ONE.close()
    assert 0 < line["rollout/mismatch_kl"] < 0.01
    assert {p.dtype for p in load_policy(tmp_path / "policy").parameters()} == {torch.float32}


class Gradients(torch.optim.SGD):
    """Keeps the gradients it was given and changes nothing."""

    kept: list[torch.Tensor]

    def step(self, closure: Any = None) -> None:
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(cfg: Config) -> tuple[list[torch.Tensor], dict[str, float], int]:
    """(gradients, metrics, number of micro-batches) of the first step of a run."""
    run = Run.build(cfg, small.ONE)
    optimizer = Gradients(run.policy.parameters(), lr=0.0)
    run = replace(run, optimizer=optimizer)
    run.engine.sync_weights(run.policy, version=0)
    examples = run.sampler.next(cfg.rollout.num_prompts)
    rollouts = sample(run, examples, 0)
    credit = assign_credit(rollouts, run.schema, cfg.advantage, cfg.loss, cfg.sampler)
    batches = pack_own(run, rollouts, credit)
    metrics = policy_update(run, batches, 0)
    return optimizer.kept, metrics, len(batches)


def test_one_micro_batch_or_four(world: Any, tmp_path: Path) -> None:
    results = []
    for rows in (100_000, 300):
        cfg = world.config(tmp_path / str(rows), train={"micro_batch_tokens": rows}, loss={"kl_coef": 0.1})
        results.append(gradients(cfg))
    (want, metrics, one), (got, metrics_of_four, several) = results
    assert one == 1 and several >= 4
    for key in ("rollout/mismatch_kl", "rollout/mismatch_max"):  # rounding errors themselves: small, but not equal
        assert max(metrics.pop(key), metrics_of_four.pop(key)) < 1e-5
    assert metrics_of_four == pytest.approx(metrics, rel=1e-5, abs=1e-9)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_prompts_of_a_step(world: Any, tmp_path: Path, world_size: int) -> None:
    cfg = world.config(tmp_path)
    run = Run.build(cfg, small.ONE)
    examples = run.sampler.next(4)
    groups = []
    for rank in range(world_size):
        parallel = Parallel(rank, world_size, rank, torch.device("cpu"))
        rollouts = sample(replace(run, parallel=parallel), examples, 0)
        assert all(r.example_id == examples[r.group].example_id for r in rollouts)
        groups += [r.group for r in rollouts]
    assert sorted(groups) == [g for g in range(4) for _ in range(4)]


def test_reward_rises(world: Any, tmp_path: Path) -> None:
    """All items mismatch their queries, so one answer is always right, and the starting policy seldom gives it."""
    examples = World(0).examples("train", 4000, start=small.NUM_PAIRS)
    write_examples(tmp_path / "strangers.jsonl", islice((e for e in examples if e.gold[2] == "mismatch"), 16))
    seed = torch.seed() % 1000
    print("seed", seed)
    changes = {"rollout": {"num_prompts": 8, "group_size": 8}, "optimizer": {"lr": 3e-3}}
    cfg = world.config(tmp_path / "run", seed=seed, num_steps=8, data={"train": str(tmp_path / "strangers.jsonl")}, **changes)
    lines = run(cfg)
    rewards = [line["reward/total"] for line in lines]
    assert statistics.mean(rewards[-3:]) > rewards[0] + 0.3, rewards
    mismatch = sorted(line["rollout/mismatch_kl"] for line in lines)
    # If two experts are nearly equal for a router, the engine can choose another than the trainer: a large mismatch of one token.
    assert mismatch[len(mismatch) // 2] < 1e-9 and mismatch[-1] < 1e-5, mismatch


# ---- bad input -----------------------------------------------------------------------------------------------------------------


def refused(world: Any, folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """The one-line error of a run that does not start and does not make its run folder."""
    line = small.complaint(srpo.train.main, world.config(folder / "run", **changes), folder, capsys)
    assert not (folder / "run").exists()
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": ""}}, "data.train is not set: name a file of judged pairs"),
        ({"data": {"train": "nowhere.jsonl"}}, "no such file or folder: nowhere.jsonl"),
        (
            {"data": {"prompt": "{query} by {maker}"}},
            r"data.prompt has \{maker\}, but example world-0-train-\d+ has no such field: use brand",
        ),
        ({"policy": {"path": "nowhere"}}, "no tokenizer in 'nowhere': policy.path must be a folder"),
        ({"policy": {"max_context": 70}}, r"example world-0-train-\d+ has \d+ tokens, .* context of 70: lower rollout.max_new"),
        ({"rollout": {"max_new_tokens": 400}}, r"more than the context of 320: lower rollout.max_new_tokens"),
        ({"train": {"micro_batch_tokens": 70}}, "more than train.micro_batch_tokens = 70: raise that"),
        ({"rollout": {"num_prompts": 65}}, "64 examples, fewer than rollout.num_prompts = 65"),
        ({"rollout": {"group_size": 1}, "advantage": {"method": "grpo"}}, "group_size is 1, but advantage.method 'grpo'"),
        ({"rollout": {"group_size": 0}}, "rollout.group_size is 0: set it to 1 or more"),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature is 0.0: set it to a number from 0.01 to 100"),
        ({"sampler": {"difficulty_low": 0.9, "difficulty_high": 0.1}}, "this window filters out everything"),
        ({"sampler": {"balance": "season"}}, r"sampler.balance: example world-0-train-\d+ has no tag 'season'"),
        ({"reward": {"judge": "none"}}, "nothing can grade step 'query_intent' of example world-0-train-.*set reward.judge"),
        ({"reward": {"judge": "generative"}}, "reward.judge_path is not set: name the checkpoint that srpo.train_judge made"),
        ({"reward": {"judge": "generative", "judge_path": "nowhere"}}, "in 'nowhere'"),
        ({"reward": {"judge_error_rate": 1.5}}, "reward.judge_error_rate is 1.5: set it to a number from 0 to 1"),
        ({"reward": {"missing_verdict": -1.0}}, "reward.missing_verdict is -1.0"),
        ({"train": {"checkpoint_every": 0}}, "train.checkpoint_every is 0: set it to 1 or more"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_happens(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    line = refused(world, tmp_path, capsys, **changes)
    assert re.search(message, line), line


def test_an_unknown_key_names_the_nearest(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "typo.toml"
    path.write_text(f'run_dir = "{tmp_path / "run"}"\n[rollout]\ngroupsize = 4\n')
    with pytest.raises(SystemExit) as stopped:
        run_program(srpo.train.main, Config, ["@", str(path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error == f"error: {path}: unknown key 'rollout.groupsize'; the nearest is 'rollout.group_size'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["train", "eval"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "line 7: not JSON"),
        (lambda row: row.pop("query") and None, "line 7: 'query' is missing"),
        (lambda row: {**row, "gold": [None, None, "perfect", None, "L4"]}, "line 7: entry 3 of 'gold' is 'perfect'"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_trained(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, change: Any, message: str
) -> None:
    data = small.rewrite_line(world.train if which == "train" else world.eval, tmp_path / "pairs.jsonl", 7, change)
    line = refused(world, tmp_path, capsys, data={which: str(data)})
    assert f"{data}, {message}" in line


def test_no_data_and_ungraded_held_out_data(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    line = refused(world, tmp_path, capsys, data={"train": str(tmp_path / "empty.jsonl")})
    assert "empty.jsonl has no examples" in line
    ungraded = small.rewrite_line(world.eval, tmp_path / "eval.jsonl", 2, lambda row: {**row, "gold": None})
    assert "has no grade" in refused(world, tmp_path, capsys, data={"eval": str(ungraded)})


def test_a_folder_of_another_configuration(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(world.config(tmp_path / "run", num_steps=1), small.ONE)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    line = small.complaint(srpo.train.main, world.config(tmp_path / "run", num_steps=1, seed=7), tmp_path, capsys)
    assert "holds a run with seed = 0, this one has 7: give another run_dir" in line
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_another_model_at_the_path_of_the_policy(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model at policy.path was replaced between two starts of a run."""
    shutil.copytree(world.policy, tmp_path / "policy")
    cfg = world.config(tmp_path / "run", num_steps=1, policy={"path": str(tmp_path / "policy")})
    train(cfg, small.ONE)
    tokenizer = load_tokenizer(world.policy)
    make_tiny(tokenizer, replace(small.TINY, hidden_size=48), 0).save_pretrained(tmp_path / "policy")
    line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    assert f"{tmp_path / 'policy'}/config.json is damaged" in line and "restore the folder" in line


def test_other_training_data_cannot_continue_a_run(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small.rewrite_line(world.train, tmp_path / "pairs.jsonl", 1, lambda row: None)
    cfg = world.config(tmp_path / "run", num_steps=1, data={"train": str(data)})
    train(cfg, small.ONE)
    small.rewrite_line(world.train, data, 1, lambda row: {**row, "example_id": "another"})
    assert f"the training data at {data} is not the one that" in small.complaint(srpo.train.main, cfg, tmp_path, capsys)


def test_a_window_that_lets_nothing_through_stops_the_run(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(srpo.training.run, "MAX_EMPTY_STEPS", 3)
    window = {"difficulty_low": 0.985, "difficulty_high": 0.99}
    cfg = world.config(tmp_path / "run", num_steps=9, sampler=window, train={"checkpoint_every": 1})
    line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    assert re.search(r"no group .* difficulty window \(0.985, 0.99\) for 3 steps; .* scores run from 0.*Widen", line), line
    lines = small.metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["rollout/num_groups_in_window"] == 0 and "train/loss" not in line for line in lines)
    # A restarted run continues to count from the checkpoint, so it stops in its first step.
    assert "for 3 steps" in small.complaint(srpo.train.main, cfg, tmp_path, capsys)


def test_few_pairs_that_are_all_outside_the_window(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "few.jsonl").write_text("".join(world.train.read_text().splitlines(keepends=True)[:4]))
    window = {"difficulty_low": 0.985, "difficulty_high": 0.99}
    cfg = world.config(tmp_path / "run", num_steps=9, sampler=window, data={"train": str(tmp_path / "few.jsonl")})
    line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    assert "all 4 examples are outside the difficulty window" in line and "lower sampler.difficulty_low" in line


def test_a_policy_that_holds_nan_stops_before_it_trains(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = load_policy(world.policy)
    policy.lm_head.weight.data[3, 2] = float("nan")
    save_policy(policy, load_tokenizer(world.policy), tmp_path / "policy")
    cfg = world.config(tmp_path / "run", policy={"path": str(tmp_path / "policy")})
    line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    assert "not all finite, first lm_head.weight" in line and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_a_dump_that_reproduces_it(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Credit:
        credit = assign_credit(*args, **kwargs)
        credit.advantages[credit.advantages.abs().sum(1).argmax()] = float("nan")
        return credit

    with monkeypatch.context() as patch:
        patch.setattr(srpo.train, "assign_credit", broken)
        cfg = world.config(tmp_path / "run")
        line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    dump = tmp_path / "run" / "non_finite.pt"
    assert "stopped before the optimizer step" in line and str(dump) in line
    assert small.metrics_of(tmp_path / "run") == []

    state = read_dump(dump)
    assert state["info"]["step"] == 0 and any(math.isnan(loss) for loss in state["losses"])
    policy, reference = (Policy(load_policy(world.policy)) for _ in range(2))
    policy.load_state_dict(state["parameters"])
    with pytest.raises(NonFiniteError):
        update(
            policy,
            torch.optim.AdamW(policy.parameters()),
            state["batches"],
            state["info"]["objective"],
            small.ONE,
            step_names=cfg.schema.names,
            grad_clip=1.0,
            dump=tmp_path / "again.pt",
            reference=reference,
        )
    assert str(read_dump(tmp_path / "again.pt")["losses"]) == str(state["losses"])
    page = (Path(__file__).resolve().parents[1] / "docs" / "debugging.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    paths = {"runs/demo/non_finite.pt": dump, "runs/demo/sft/policy": world.policy, "again.pt": tmp_path / "2.pt"}
    for name, path in paths.items():
        assert name in code
        code = code.replace(name, str(path))
    with pytest.raises(NonFiniteError):
        exec(code, {})
    assert str(read_dump(tmp_path / "2.pt")["losses"]) == str(state["losses"])
    # The failed run leaves nothing behind: with the cause removed, the same run folder continues.
    assert len(run(cfg)) == 3
