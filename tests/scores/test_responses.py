from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srpo.core.batch import Rollout, write_rollouts
from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, PAPER_STEPS, StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.scores.evaluation import results_dict
from srpo.scores.responses import (
    from_file,
    from_predictions,
    from_rollouts,
    load_rollouts,
    read_predictions,
    verdicts_alone,
)

SCHEMA = PAPER
ANSWERS = ("shoes", "boots; color red", "related", "match")
EXAMPLES = [
    Example(
        f"e{i}",
        f"q{i}",
        "query",
        "title",
        gold=(None, None, "related", "match", f"L{1 + i % 4}"),
        truth=(*ANSWERS, None),
        tags={"query_type": "odd" if i % 2 else "even"},
    )
    for i in range(10)
]
ROLLOUTS = [
    Rollout(f"e{i}", i, (1,), (2, 3), (0.0, 0.0), (0, 0, 0, 1, 2), (*ANSWERS, f"L{1 + i % 4}" if i else None), "", "stop", 0)
    for i in range(10)
]


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def predictions(**changes: Any) -> list[dict[str, Any]]:
    return [{"example_id": e.example_id, "prediction": e.grade if i else None, **changes} for i, e in enumerate(EXAMPLES)]


def test_predictions_are_scored_as_verdicts_alone(tmp_path: Path):
    responses = from_predictions(read_predictions(written(tmp_path / "p.jsonl", *predictions()), SCHEMA), EXAMPLES, SCHEMA)
    results = results_dict(responses.rollouts, responses.examples, responses.schema)
    assert (results["accuracy"], results["parse_rate"], results["step_accuracy"]) == (0.9, 0.9, [0.9])
    assert results["consistency"] is None
    assert results["by"]["query_type"]["odd"]["macro_f1"] == 0.5  # odd pairs have grades 2 and 4 only


def test_predictions_with_answers_are_scored_step_by_step(tmp_path: Path):
    rows = predictions()
    for row in rows:
        row["answers"] = ["shoes", "boots", "Related", None, row["prediction"] and row["prediction"].lower()]
    responses = from_predictions(read_predictions(written(tmp_path / "p.jsonl", *rows), SCHEMA), EXAMPLES, SCHEMA)
    results = results_dict(responses.rollouts, responses.examples, responses.schema)
    assert results["step_accuracy"] == [1.0, 0.0, 1.0, 0.0, 0.9]
    assert results["accuracy"] == 0.9
    assert results["consistency"]["verdict_right_steps_wrong"] == 0.9


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2"),
        ({"example_id": "e1"}, "line 2.*prediction"),
        ([1], "line 2"),
        ({"example_id": "e1", "prediction": 5}, "line 2.*prediction is 5"),
        ({"example_id": "e1", "prediction": "L5"}, "line 2.*the grades are L1, L2, L3, L4; .*, or null for none"),
        ({"example_id": "e1", "prediction": True}, "line 2.*the grades are L1, L2, L3, L4"),
        ({"example_id": None, "prediction": 1}, "line 2.*example_id is None"),
        ({"example_id": "e0", "prediction": 2}, "line 2.*second prediction of 'e0'"),
        ({"example_id": "e1", "prediction": 2, "answers": [*ANSWERS, "L2"]}, "line 2.*some have none"),
        ({"example_id": "e1", "prediction": 2, "answers": "L2"}, "line 2.*list of 5 strings"),
        ({"example_id": "e1", "prediction": 2, "answers": ["L2"]}, "line 2.*list of 5 strings"),
        ({"example_id": "e1", "prediction": 2, "answers": [*ANSWERS[:3], "perhaps", "L2"]}, "line 2.*'perhaps' is no answer"),
        ({"example_id": "e1", "prediction": 2, "answers": [*ANSWERS, "L3"]}, "line 2.*the same verdict"),
    ],
)
def test_bad_prediction_lines_name_file_and_line(tmp_path: Path, row: Any, message: str):
    with pytest.raises(ValueError, match=rf"p\.jsonl, {message}"):
        read_predictions(written(tmp_path / "p.jsonl", {"example_id": "e0", "prediction": 1}, row), SCHEMA)


def test_a_prediction_from_a_column_with_missing_values_is_taken_exactly(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"example_id": "e0", "prediction": 3.0}, {"example_id": "e1", "prediction": None}]
    assert read_predictions(written(tmp_path / "p.jsonl", *rows), SCHEMA) == {"e0": ("L3",), "e1": (None,)}
    for bad in (2.5, 0.0, 5.0):
        with pytest.raises(ValueError, match=rf"line 2: prediction is {bad}: the grades are L1, L2, L3, L4"):
            read_predictions(written(tmp_path / "p.jsonl", rows[0], {"example_id": "e1", "prediction": bad}), SCHEMA)


def test_a_file_without_predictions_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is empty: give at least one prediction"):
        read_predictions(written(tmp_path / "p.jsonl"), SCHEMA)


def test_predictions_are_of_the_examples_and_all_of_them(tmp_path: Path):
    by_id = {"e0": ("L1",), "e1": ("L1",)}
    with pytest.raises(ValueError, match="8 of 10 examples have no prediction, such as e2"):
        from_predictions(by_id, EXAMPLES, SCHEMA)
    with pytest.raises(ValueError, match="1 predictions have no example in the data, such as e1"):
        from_predictions(by_id, EXAMPLES[:1], SCHEMA)
    assert from_predictions(by_id, EXAMPLES[:2], SCHEMA, limit=1).examples == [replace(EXAMPLES[0], gold=("L1",), truth=())]


def test_every_example_needs_a_rollout_and_others_are_counted():
    with pytest.raises(ValueError, match="1 of 10 examples have no rollout, such as e9"):
        from_rollouts(ROLLOUTS[:9], EXAMPLES, SCHEMA)
    with pytest.raises(ValueError, match="has 5 steps, the settings have 1"):
        from_rollouts(ROLLOUTS, EXAMPLES, StepSchema(PAPER_STEPS[-1:]))
    with pytest.raises(ValueError, match="e1 has the verdict 'L2', the settings have the grades no, yes: set --config"):
        from_rollouts(ROLLOUTS, EXAMPLES, StepsConfig().schema(Grades(("no", "yes"))))
    responses = from_rollouts([*ROLLOUTS, ROLLOUTS[0]], EXAMPLES[:2], SCHEMA)
    assert [rollout.example_id for rollout in responses.rollouts] == ["e0", "e1", "e0"]
    assert [example.example_id for example in responses.examples] == ["e0", "e1", "e0"]
    assert responses.num_others == 8


def test_a_file_or_folder_gives_one_response_to_each_example(tmp_path: Path):
    write_rollouts(tmp_path / "rollouts.jsonl", ROLLOUTS[::-1], step=0)
    for source in (tmp_path, tmp_path / "rollouts.jsonl"):
        responses = from_file(source, EXAMPLES, SCHEMA)
        assert (responses.rollouts, responses.examples, responses.schema) == (ROLLOUTS, EXAMPLES, SCHEMA)
    responses = from_file(written(tmp_path / "p.jsonl", *predictions()), EXAMPLES, SCHEMA)
    assert (responses.schema.num_steps, responses.schema.grades) == (1, SCHEMA.grades)
    alone = verdicts_alone(from_file(tmp_path, EXAMPLES, SCHEMA))
    assert [r.answers for r in alone.rollouts] == [r.answers for r in responses.rollouts]
    assert alone.examples == responses.examples
    write_rollouts(tmp_path / "rollouts.jsonl", ROLLOUTS[:1], step=0)
    with pytest.raises(ValueError, match="several rollouts of e0"):
        from_file(tmp_path, EXAMPLES, SCHEMA)
    with pytest.raises(ValueError, match="no such file"):
        from_file(tmp_path / "none", EXAMPLES, SCHEMA)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: .*give a line of a rollouts\.jsonl"):
        load_rollouts(written(tmp_path / "x.jsonl", {"a": 1}))
