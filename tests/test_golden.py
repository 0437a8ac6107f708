"""Golden runs: every program at its smallest size, number by number, against `tests/golden/runs/`.

They are the scenarios of `tools/same_numbers.py`, started from a stored policy: a policy trained here would differ from one kind
of CPU to another by more than a rounding, and so would its samples. `make golden` keeps the stored policy.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import same_numbers
from invariants import check_results, check_run
from programs import programs

from srpo.core.config.demo import DemoConfig
from srpo.core.settings import load
from srpo.experiments.start import make_data

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
START = GOLDEN / "start"  # `demo/sft/policy` as the scenario `demo` left it once; it parses 4 of 10 of its responses
FILES = (
    "metrics.jsonl",
    "results.json",
    "selection.json",
    "comparison.json",
    "sft.json",
    "mine.json",
    "verified.json",
    "grpo.json",
)
UNTRAINED = ("demo", "reproduce", "report")  # the first two train from nothing, the last one draws
TRAINED = ("srpo", "grpo", "ppo", "gspo", "dapo", "replay", "off_policy")
WITHOUT_REFERENCE = ("gspo", "dapo")
OTHERS = ("sft", "dpo", "select", "judge", "scalar", "evaluate", "evaluate_start", "compare")


def scenarios() -> dict[str, str]:
    """{name: command}. `srpo` stands for the demo: it makes the checkpoint and the rollouts that later scenarios read."""
    srpo = same_numbers.SCENARIOS["grpo"].replace("@ {configs}/baselines/grpo.toml ", "").replace("-dir grpo", "-dir demo")
    srpo += " --num-steps 3 --data.eval demo/data/eval.jsonl --train.eval-every 2"
    return {"srpo": srpo} | {name: command for name, command in same_numbers.SCENARIOS.items() if name not in UNTRAINED}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """{scenario: its lines}, having run them all in one folder."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "demo" / "data").mkdir(parents=True)
    make_data(DemoConfig(num_demonstrations=600, num_train=96, num_eval=24), folder / "demo" / "data")
    for place in ("demo/base", "demo/sft/policy"):
        shutil.copytree(START, folder / place)
    lines: dict[str, list[dict[str, Any]]] = {}
    known: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, command in scenarios().items():
            module, *arguments = shlex.split(command.format(configs=ROOT / "configs"))
            program = importlib.import_module(module)
            program.main(load(getattr(program, programs()[module]), arguments))
            written = {
                file: data for file, data in same_numbers.written_files(folder) if Path(file).name in FILES and file not in known
            }
            known |= written.keys()
            lines[name] = [line for file, data in written.items() for line in read(file, data)]
    for path in folder.rglob("metrics.jsonl"):
        check_run(path.parent)
    for path in folder.rglob("results.json"):
        check_results(path)
    return lines


def read(file: str, data: bytes) -> Iterator[dict[str, Any]]:
    """The numbers of a JSON file, or of each line of a JSON Lines file, by dotted key."""
    rows = data.splitlines() if file.endswith(".jsonl") else [data]
    for number, row in enumerate(rows, start=1):
        yield {"file": file, "line": number} | dict(leaves(json.loads(row)))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, float | None]]:
    """(dotted key, number or None) of everything in a JSON value that is no text."""
    if isinstance(value, (dict, list)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{key}.{name}" if key else str(name))
    elif not isinstance(value, str):
        yield key, value


def tolerance(key: str) -> float:
    """Relative. The mismatch of engine and trainer is nothing but rounding."""
    return math.inf if "mismatch" in key else 1e-4


def rounded(value: Any) -> Any:
    return float(f"{value:.8g}") if isinstance(value, float) else value


@pytest.mark.golden
@pytest.mark.parametrize("name", [*TRAINED, *OTHERS])
def test_a_run_is_golden(name: str, values: dict[str, list[dict[str, Any]]]) -> None:
    """Counts exactly, floats to 1e-4: tokens must be the same on any CPU, sums may round differently."""
    path = GOLDEN / "runs" / f"{name}.jsonl"
    if os.environ.get("SRPO_GOLDEN") == "write":
        text = "".join(json.dumps({key: rounded(value) for key, value in line.items()}) + "\n" for line in values[name])
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing: `make golden` writes it"
    golden = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line.keys() for line in values[name]] == [line.keys() for line in golden]
    changed = [
        f"{line['file']}, line {line['line']}: {key} is {line[key]}, golden {stored[key]}"
        for line, stored in zip(values[name], golden, strict=True)
        for key in stored
        if not same(key, line[key], stored[key])
    ]
    assert not changed, "\n".join([*changed, "if that is meant: `make golden`, and say why in the commit"])


def same(key: str, value: Any, stored: Any) -> bool:
    if isinstance(value, float) and stored is not None:
        return value == pytest.approx(stored, rel=tolerance(key), abs=1e-7)
    return value == stored


def test_every_scenario_has_golden_values() -> None:
    assert {path.stem for path in (GOLDEN / "runs").glob("*.jsonl")} == scenarios().keys()


@pytest.mark.parametrize("name", TRAINED)
def test_a_golden_run_is_worth_watching(name: str) -> None:
    lines = [json.loads(line) for line in (GOLDEN / "runs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/grad_norm" in line]
    assert len(steps) >= 2
    for step in steps:
        assert step["rollout/num_groups_in_window"] >= 2 and step["rollout/parse_rate"] > 0.1
        assert step["reward/total"] > 0 and step["advantage/abs_mean"] > 0.1 and step["train/grad_norm"] > 0
    if name in WITHOUT_REFERENCE:
        assert not any(key.startswith("policy/kl") for step in steps for key in step)
    else:
        assert max(step["policy/kl"] for step in steps) > 1e-6
