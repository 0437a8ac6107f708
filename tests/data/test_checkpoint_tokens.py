from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest

from srpo.core.config.train import Config, RolloutConfig
from srpo.core.errors import UserError
from srpo.data.checkpoint_tokens import check_rows, stop_ids, without_end
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.model import make_tiny
from srpo.rollout.build import sampling_params


def saved(folder: Path, **fields: Any) -> Path:
    make_tiny(lab.tokenizer(), lab.CONFIG, 0).save_pretrained(folder)
    lab.tokenizer().save_pretrained(folder)
    for name, eos in fields.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": eos}))
    return folder


def test_every_end_token_of_the_folder_stops(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, config=[2, 5], generation_config=7))
    assert stop_ids(tokenizer) == (2, 5, 7)
    assert sampling_params(Config(rollout=RolloutConfig()), tokenizer).stop_ids == (2, 5, 7)
    assert stop_ids(lab.tokenizer()) == (2,)  # of no folder
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is 'w5'"):
        stop_ids(load_tokenizer(saved(tmp_path, generation_config="w5")))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    lab.tokenizer(lab.VOCAB + 1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has the id 50, and the model in .* has 50 rows"):
        load_tokenizer(tmp_path)
    lab.tokenizer(lab.VOCAB - 1).save_pretrained(tmp_path)  # a padded vocabulary
    check_rows(load_tokenizer(tmp_path), tmp_path)


@pytest.mark.parametrize("damage", ["{}", "{", "[]"])
def test_a_damaged_tokenizer_is_one_sentence(damage: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "tokenizer.json").write_text(damage)
    with pytest.raises(UserError, match="cannot be loaded") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_a_tokenizer_with_code_neither_runs_nor_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    file = saved(tmp_path) / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    try:
        load_tokenizer(tmp_path)
    except UserError as refused:
        assert str(tmp_path) in str(refused)
    assert not asked and not (tmp_path / "ran").exists()


def test_a_target_ends_once() -> None:
    tokenizer = lab.tokenizer()
    assert without_end(tokenizer, "w3 w4</s></s>") == "w3 w4"
    assert without_end(tokenizer, "w3</s> w4") == "w3</s> w4"
    assert without_end(tokenizer, "") == ""
