from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from srpo.core.errors import MissingPackage
from srpo.core.metrics import METRICS, MetricsLogger, check_key, evaluation_metrics, read_metrics, truncate_jsonl


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(run_dir: Path, steps: range, seed: int, resume_step: int | None = None) -> None:
    with MetricsLogger(run_dir, resume_step=resume_step) as logger:
        for step in steps:
            rng = random.Random(f"{seed} {step}")
            logger.log(step, {"reward/total": rng.random(), "train/loss": rng.gauss(0, 1e-9), "time/step_s": rng.random()})
            with (run_dir / "rollouts.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "text": "}\n"}) + "\n")


def test_line_has_step_first_then_sorted_keys_and_exact_numbers(tmp_path: Path):
    third = torch.tensor(1 / 3, dtype=torch.float32)
    with MetricsLogger(tmp_path) as logger:
        tiny = np.float64(1e-310)
        logger.log(3, {"train/loss": third, "reward/total": 0.1 + 0.2, "rollout/num_groups": 7, "eval/macro_f1": tiny})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 3, "eval/macro_f1": 1e-310, "reward/total": 0.30000000000000004, "rollout/num_groups": 7, '
        '"train/loss": 0.3333333432674408}\n'
    )
    assert torch.tensor(lines(tmp_path / "metrics.jsonl")[0]["train/loss"]) == third


def test_durations_go_to_timing_only(tmp_path: Path):
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"time/rollout_s": 0.5, "time/step_s": 1, "train/loss": 1.0})
        logger.log(2, {"train/loss": 2.0})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}]
    assert lines(tmp_path / "timing.jsonl") == [{"step": 1, "time/rollout_s": 0.5, "time/step_s": 1}]


def test_unknown_values_are_left_out_and_nonfinite_ones_are_null(tmp_path: Path):
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"policy/kl": None, "train/loss": float("nan"), "train/grad_norm": torch.tensor(float("inf"))})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train/grad_norm": None, "train/loss": None}]


@pytest.mark.parametrize(
    "key", ["reward/totl", "reward/step/", "reward/step/a/b", "eval/class_f1/0", "eval/class_f1/11", "total", "policy/kl/S 1"]
)
def test_undeclared_key_is_refused_and_nothing_is_written(tmp_path: Path, key: str):
    with MetricsLogger(tmp_path) as logger, pytest.raises(ValueError, match="METRICS"):
        logger.log(1, {"train/loss": 1.0, key: 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_every_declared_key_is_accepted_with_its_parts_filled_in():
    for key in METRICS:
        for number in range(1, 11):
            check_key(key.format_map({"step": "query_intent", "class": str(number), "phase": "rollout"}))


def test_steps_are_logged_once_and_in_order(tmp_path: Path):
    with MetricsLogger(tmp_path) as logger:
        logger.log(2, {"train/loss": 1.0})
        for step in (2, 1):
            with pytest.raises(ValueError, match="once, in order"):
                logger.log(step, {"train/loss": 1.0})


@pytest.mark.parametrize("seed", range(3))
def test_resumed_files_equal_those_of_a_run_never_killed(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    checkpoint, killed = sorted(rng.sample(range(1, 12), 2))
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    logged(tmp_path / "straight", range(1, 13), seed)
    logged(tmp_path / "killed", range(1, killed + 1), seed)
    for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl"):  # a kill in the middle of a write
        path = tmp_path / "killed" / name
        path.write_bytes(path.read_bytes()[: -rng.randint(1, 9)])
    logged(tmp_path / "killed", range(checkpoint + 1, 13), seed, resume_step=checkpoint)
    for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_new_run_starts_empty_in_a_used_folder(tmp_path: Path):
    logged(tmp_path, range(1, 4), 0)
    MetricsLogger(tmp_path).close()
    assert [(tmp_path / name).read_text() for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")] == ["", "", ""]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"step": 2, "a": 1}\n', 3),
        ('{"a": 1, "step": 2}\n', 3),  # keys in another order
        ('{"step": 2, "a": 1}', 2),  # no newline: half-written
        ('{"step": 2, "a": \n{"step": 2}\n', 2),  # broken line, and what follows it
        ("\0\0\0\0\n", 2),
        ('{"a": ' + "[" * 9000 + "}\n", 2),
        ('{"a": 2}\n', 2),
        ('{"step": 3}\n', 2),
    ],
)
def test_truncation_keeps_whole_lines_up_to_the_step(tmp_path: Path, tail: str, kept: int):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    truncate_jsonl(path, 2)
    assert len(path.read_text().splitlines()) == kept
    truncate_jsonl(path, 0)
    assert path.read_text() == ""
    truncate_jsonl(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_read_metrics_leaves_out_a_half_written_line(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2, "tra')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "train/loss": 0.5}]


def test_evaluation_metrics_are_declared_and_skip_unknown_steps():
    results = {"macro_f1": 0.1, "accuracy": 0.2, "good_f1": 0.3, "parse_rate": 1.0, "num_examples": 9}
    results |= {"class_f1": [0.0, 0.1, 0.2, 0.3], "majority": {"accuracy": 0.4}, "top_verdict": {"share": 0.6}}
    metrics = evaluation_metrics({**results, "step_accuracy": [0.5, None]}, ("item", "verdict"))
    for key in metrics:
        check_key(key)
    assert metrics["eval/class_f1/4"] == 0.3
    assert metrics["eval/step_accuracy/item"] == 0.5
    assert "eval/step_accuracy/verdict" not in metrics


def test_tensorboard_gets_every_metric(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    for resume_step, steps in ((None, (1, 2)), (1, (2, 3))):
        with MetricsLogger(tmp_path, tensorboard=True, resume_step=resume_step, config={"seed": 1}) as logger:
            for step in steps:
                logger.log(step, {"train/loss": step / 2, "time/step_s": 1.0})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert "time/step_s" in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_metrics_and_go_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run))
    for resume_step in (None, 1):
        wanted: dict[str, Any] = {name: True, "config": {"seed": 1}}
        with MetricsLogger(tmp_path, resume_step=resume_step, **wanted) as logger:
            logger.log((resume_step or 0) + 1, {"train/loss": 0.5})
    first, second = calls[0], calls[3]
    assert first["config"] == {"seed": 1}
    assert first["project"] == "srpo"
    assert calls[1:3] == [(1, {"train/loss": 0.5}), "finish"]
    assert second["resume"] == "allow"
    assert first["name"] == second["name"] == tmp_path.name
    assert first.get("id") == second.get("id")


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_missing_tracker_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    wanted: dict[str, Any] = {name: True}
    with pytest.raises(MissingPackage, match=f"pip install {name}"):
        MetricsLogger(tmp_path, **wanted)


def test_docs_list_every_metric_with_its_description():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = dict(line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| `"))
    assert rows == {f"`{key}`": description.replace("|", "\\|") for key, description in METRICS.items()}
