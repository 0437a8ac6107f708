"""The ranges of settings: every number of every program has one, and no value outside it gets past loading."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pytest
from programs import programs

from srpo.core.config.train import Config, StageConfig
from srpo.core.errors import UserError
from srpo.core.ranges import BelowOne, Count, Finite, Fraction, OpenFraction, Positive, Range, check_ranges, numbers
from srpo.core.settings import apply_table, load
from srpo.core.step_presets import StepChange, StepsConfig
from srpo.training.checks import check_settings

CLASSES = {module: getattr(importlib.import_module(module), name) for module, name in programs().items()}
EXTREMES = (-math.inf, -1e30, -(10**30), -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 2**31, 10**30, 1e30, math.inf, math.nan)


def bounds_of(config: Any) -> dict[str, Range | None]:
    return {key: bounds for key, _, bounds in numbers(config)}


@pytest.mark.parametrize("module", sorted(CLASSES))
def test_every_number_of_a_program_has_a_range_that_holds_its_default(module: str) -> None:
    config = CLASSES[module]()
    assert [key for key, bounds in bounds_of(config).items() if bounds is None] == []
    check_ranges(config)


def test_so_has_every_number_in_an_array_of_tables() -> None:
    stage = StageConfig("a", solve_rate=(0.1, 0.2), difficulty_low=0.1, difficulty_high=0.9)
    config = Config(steps=StepsConfig("own", named={"a": StepChange(reward=0.1, missing_verdict=0.5)}), curriculum=(stage,))
    bounds = bounds_of(config)
    assert [key for key in bounds if key.startswith("steps")] == ["steps.a.reward", "steps.a.missing_verdict"]
    assert {"curriculum[0].solve_rate[1]", "curriculum[0].difficulty_low", "curriculum[0].patience"} <= bounds.keys()
    assert None not in bounds.values()


def table_of(key: str, value: float) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: table_of(rest, value) if rest else value}


@pytest.mark.parametrize("module", sorted(CLASSES))
def test_a_file_with_a_number_out_of_range_is_refused_by_key(module: str) -> None:
    refused = 0
    for key, default, bounds in numbers(CLASSES[module]()):
        if "[" in key or bounds is None:
            continue
        for value in EXTREMES:
            if type(default) is int and type(value) is float:
                continue  # refused for its type
            value = float(value) if type(default) is float else value
            if value not in bounds:
                refused += 1
                with pytest.raises(UserError, match=rf"^x\.toml: .*{key}"):
                    apply_table(CLASSES[module](), table_of(key, value), "x.toml")
    assert refused or not list(numbers(CLASSES[module]()))


@pytest.mark.parametrize("flag", ["--rollout.temperature nan", "--optimizer.warmup-steps -1", "--optimizer.grad-clip nan"])
def test_so_is_a_flag(flag: str) -> None:
    with pytest.raises(UserError, match="set it to"):
        load(Config, flag.split())


def test_settings_made_in_python_are_checked_too() -> None:
    config = Config()
    with pytest.raises(UserError, match=r"^optimizer\.betas\[1\] is 1\.0: set it to a number from 0 to below 1$"):
        check_settings(replace(config, optimizer=replace(config.optimizer, betas=(0.9, 1.0))))


@dataclass(frozen=True)
class Numbers:
    count: Count = 1
    share: Fraction = 0.5
    below: BelowOne = 0.5
    inside: OpenFraction = 0.5
    above: Positive = 1.0
    finite: Finite | None = None
    few: Annotated[int, Range(0, 3)] = 0
    pair: tuple[Fraction, Count] = (0.5, 1)
    table: dict[str, Fraction] = field(default_factory=dict)
    on: bool = True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "count is -1: set it to 0 or more"),
        ({"count": 2**31}, "count is 2147483648: set it to at most 2147483647"),
        ({"share": 1.01}, "share is 1.01: set it to a number from 0 to 1"),
        ({"below": 1.0}, "below is 1.0: set it to a number from 0 to below 1"),
        ({"inside": 0.0}, "inside is 0.0: set it to a number above 0 and below 1"),
        ({"above": 0.0}, "above is 0.0: set it to a number above 0"),
        ({"above": math.inf}, "above is inf: set it to at most 1e+30"),
        ({"above": 1e38}, "above is 1e+38: set it to at most 1e+30"),
        ({"finite": math.nan}, "finite is nan: set it to a number from -1e+30 to 1e+30"),
        ({"few": 4}, "few is 4: set it to a number from 0 to 3"),
        ({"pair": (0.5, -1)}, "pair[1] is -1: set it to 0 or more"),
        ({"table": {"a": 0.5, "b": 2.0}}, "table.b is 2.0: set it to a number from 0 to 1"),
    ],
)
def test_the_message_names_key_value_and_range(changes: dict[str, Any], message: str) -> None:
    check_ranges(Numbers())
    with pytest.raises(UserError) as caught:
        check_ranges(replace(Numbers(), **changes))
    assert str(caught.value) == message
