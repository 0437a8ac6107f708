"""Recipes are valid settings and differ only in the subject of their row; the paper's tables are complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from srpo.core.config.reproduce import Scale
from srpo.core.config.train import Config
from srpo.experiments.recipes import RECIPES, base, config_of
from srpo.experiments.tables import STEPS, TABLES
from srpo.training.checks import check_settings

COMMON = base(Scale(), Path("run"), Path("train.jsonl"), Path("eval.jsonl"), Path("policy"), seed=3)


def settings(name: str) -> Config:
    return config_of(RECIPES[name], COMMON, Path("judge"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_that_could_start(name: str) -> None:
    check_settings(settings(name), 1)


def test_rows_differ_in_what_they_are_about_and_in_nothing_else() -> None:
    assert settings("srpo") == COMMON
    assert settings("grpo") == replace(COMMON, advantage=replace(COMMON.advantage, method="grpo"))
    judged = settings("srpo_judged")
    assert [spec.sources for spec in judged.schema.specs] == [("judge",)] * 4 + [("gold",)]
    assert replace(judged, steps=COMMON.steps, train=COMMON.train) == COMMON
    assert judged.train == replace(COMMON.train, eval_every=0)  # no plot shows its curve
    assert settings("grpo_random_half").num_steps == COMMON.num_steps // 2
    assert settings("srpo_generative").reward.judge_path == "judge"


def test_a_curriculum_shares_the_steps_of_the_run() -> None:
    first, last = settings("grpo_easier_harder").curriculum
    assert (first.num_steps, last.num_steps) == (COMMON.num_steps // 2, 0)
    assert first.tags == {"difficulty": ("easy", "medium")} and last.tags == {"difficulty": ("hard",)}
    assert first.balance == last.balance == ("grade",)


def test_tables_name_recipes_and_have_a_number_in_every_column() -> None:
    assert set(TABLES) == {"table1", "table2", "table3", "table4", "table5", "table6", "table8", "table9"}
    used = {row.recipe for name, table in TABLES.items() if name != "table2" for row in table.rows}
    assert used == set(RECIPES)
    for table in TABLES.values():
        for row in table.rows:
            assert len(row.paper) in (0, len(table.columns)), row
    assert TABLES["table2"].columns == STEPS
