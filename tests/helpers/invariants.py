"""Invariants of every line that a run logs and of every results.json, whatever its configuration."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from srpo.core.config.train import Config
from srpo.core.metrics import CLOCK_AREAS, check_key, read_metrics
from srpo.core.settings import apply_table

_FRACTION = re.compile(r".*(_frac|_rate|accuracy|_f1|group_score)(/\w+)?")
_OF_STEPS = ("reward/step/", "rollout/response_length/")  # the parts add up to the whole
_MEANS = ("policy/entropy", "policy/kl", "policy/clip_frac", "policy/ratio")  # the whole is a mean of the parts


def check_run(run_dir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, after checking each of them and those of `timing.jsonl`."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    path = run_dir / "config.toml"
    config = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), f"{run_dir}: steps are not 1..n, once each"
    for line in lines:
        problems = [f"{run_dir}, step {line['step']}: {problem}" for problem in problems_of(line, config)]
        assert not problems, "\n".join(problems)
    timing = read_metrics(run_dir / "timing.jsonl") if (run_dir / "timing.jsonl").exists() else []
    assert [line["step"] for line in timing] == sorted({line["step"] for line in timing})
    for line in timing:
        assert all(key.partition("/")[0] in CLOCK_AREAS and value >= 0 for key, value in line.items() if key != "step"), line
    return lines


def problems_of(line: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """The faults of one line. config: the resolved settings of the run; {} if there are none."""
    values = {key: value for key, value in line.items() if key != "step"}
    for key, value in values.items():
        check_key(key)
        if type(value) not in (int, float) or not math.isfinite(value):
            yield f"{key} is {value}: a metric without a value has no key"
            return
        if key.partition("/")[0] in CLOCK_AREAS:
            yield f"{key} depends on the clock"
        if _FRACTION.fullmatch(key) and not -1e-12 <= value <= 1 + 1e-12:
            yield f"{key} is {value}, no fraction"
        if key.partition("/")[2].startswith("num_") and (value < 0 or value != int(value)):
            yield f"{key} is {value}, no count"
    for prefix in _OF_STEPS:
        parts = [value for key, value in values.items() if key.startswith(prefix)]
        whole = values.get("reward/total" if prefix == "reward/step/" else prefix.rstrip("/"))
        if parts and not math.isclose(math.fsum(parts), whole or 0.0, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{prefix}* add up to {math.fsum(parts)}, not {whole}"
    for whole in _MEANS:
        parts = [value for key, value in values.items() if key.startswith(f"{whole}/")]
        if bool(parts) != (whole in values):
            yield f"{whole} and its parts are not together"
        elif parts and not min(parts) - 1e-9 <= values[whole] <= max(parts) + 1e-9:
            yield f"{whole} is {values[whole]}, outside its parts {parts}"
    yield from _training_problems(values, config)
    yield from _evaluation_problems(values, config)


def _training_problems(values: Mapping[str, float], config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that are there exactly if they have a value, in a line of srpo.train."""
    if "rollout/num_groups" not in values:
        return
    trained = values["rollout/num_groups_in_window"] > 0
    if values["rollout/num_groups_in_window"] > values["rollout/num_groups"]:
        yield "more groups in the window than groups"
    if ("train/loss" in values) != trained:
        yield f"train/loss is {'missing' if trained else 'there'}, {values['rollout/num_groups_in_window']} groups train"
    tokens = values.get("train/num_tokens", 0) > 0
    for key in ("advantage/abs_mean", "advantage/clip_frac", "policy/entropy", "rollout/mismatch_kl"):
        if (key in values) != tokens:
            yield f"{key} is {'missing' if tokens else 'there'}, {values.get('train/num_tokens', 0)} tokens train"
    clip = config.get("advantage", {}).get("clip")
    if clip is not None and "advantage/clip_frac" in values:
        if not clip and values["advantage/clip_frac"]:
            yield f"advantage/clip_frac is {values['advantage/clip_frac']} without a clip"
        if clip and values["advantage/abs_mean"] < clip * values["advantage/clip_frac"] - 1e-6:
            yield "advantage/abs_mean is less than what was clipped"
    if "loss" in config and ("policy/kl" in values) != (tokens and config["loss"]["kl_coef"] > 0):
        yield f"policy/kl is {values.get('policy/kl')} with loss.kl_coef = {config['loss']['kl_coef']}"
    if config.get("reward", {}).get("judge") == "none" and "reward/missing_frac" in values:
        yield "reward/missing_frac without a judge"
    if ("critic/value" in values) != (tokens and config.get("advantage", {}).get("method") == "ppo"):
        yield "critic/* without a critic, or none with one"


def _evaluation_problems(values: Mapping[str, float], config: Mapping[str, Any]) -> Iterator[str]:
    if "eval/accuracy" not in values:
        return
    tables = {key: config[key] for key in ("steps", "grades") if key in config}
    schema = apply_table(Config(), tables, "config.toml").schema
    last, num = schema.names[-1], len(schema.grades.names)
    if not math.isclose(values[f"eval/step_accuracy/{last}"], values["eval/accuracy"]):
        yield f"eval/accuracy is {values['eval/accuracy']}, that of the step {last} {values[f'eval/step_accuracy/{last}']}"
    classes = [values[f"eval/class_f1/{grade}"] for grade in range(1, num + 1)]
    if not math.isclose(sum(classes) / num, values["eval/macro_f1"], abs_tol=1e-12):
        yield "eval/macro_f1 is not the mean of eval/class_f1/*"


def check_results(path: Path) -> None:
    """Check a `results.json`: every confusion matrix sums to its number of examples, and accuracy is that of the last step."""

    def check(results: Any, where: str) -> None:
        if not isinstance(results, dict):
            return
        if "confusion" in results and "num_examples" in results:
            assert sum(map(sum, results["confusion"])) == results["num_examples"], f"{path}: {where}"
            hits = sum(results["confusion"][i][i] for i in range(4))
            assert math.isclose(results["accuracy"], hits / results["num_examples"]), f"{path}: {where}"
            assert math.isclose(results["accuracy"], results["step_accuracy"][-1]), f"{path}: {where}"
            for low, high in [results["confidence"]["macro_f1"] or (0, 1)] if "confidence" in results else ():
                assert 0 <= low <= high <= 1, f"{path}: {where}"
        for key, value in results.items():
            check(value, f"{where}.{key}")

    check(json.loads(path.read_text(encoding="utf-8")), "")
