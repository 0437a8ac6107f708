from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
from tokenizers.models import WordLevel

from srpo.core.config.train import Config, RolloutConfig
from srpo.core.errors import UserError
from srpo.data.checkpoint_tokens import check_rows, highest_id, stop_ids, without_end
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


def test_the_rows_of_a_model_are_known(tmp_path: Path) -> None:
    for rows in (None, "50", True):
        file = saved(tmp_path) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": rows}))
        with pytest.raises(UserError, match=rf"config\.json: vocab_size is {rows!r}: set it to the number of rows"):
            check_rows(lab.tokenizer(), tmp_path)
    file.unlink()
    check_rows(lab.tokenizer(), tmp_path)


@pytest.mark.parametrize(
    "damage", ["{}", "{", "[]", ("vocab", "vocaa"), ("added_tokens", "added_tokent"), ("WordLevel", "WordLevfl")]
)
def test_a_damaged_tokenizer_is_one_sentence(damage: str | tuple[str, str], tmp_path: Path) -> None:
    file = saved(tmp_path) / "tokenizer.json"
    file.write_text(damage if isinstance(damage, str) else file.read_text().replace(*damage))
    with pytest.raises(UserError, match="cannot be loaded") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "fields", [{"eos_token_id": "5"}, {"eos_token_id": [5.0]}, {"eos_token_id": [[5]]}, {"hidden_size": "32"}]
)
def test_a_config_with_a_wrong_field_is_one_sentence(fields: dict[str, Any], tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    settings = tmp_path / "tokenizer_config.json"  # without the class, transformers reads the config
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "tokenizer_class"}))
    with pytest.raises(UserError, match=r"config\.json is not the config of a model .*: correct it") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value) and next(iter(fields)) in str(refused.value)


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
    for after in ("\n", " ", "\n\n", "\n</s> "):
        assert without_end(tokenizer, f"w3 w4\n</s>{after}") == "w3 w4\n"
    assert without_end(tokenizer, "w3\n") == "w3\n"


def test_a_target_ends_without_any_end_token_of_the_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, config=[2, 5], generation_config=7))
    for end in ("w5", "w7\n", "</s>", "w7</s>\n"):
        assert without_end(tokenizer, f"w3 {end}") == "w3 "


def test_the_highest_id_counts_not_the_number_of_ids() -> None:
    tokenizer: Any = lab.tokenizer()
    tokenizer._tokenizer.model = WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "w": 720}, unk_token="<pad>")
    assert highest_id(tokenizer) == 720
