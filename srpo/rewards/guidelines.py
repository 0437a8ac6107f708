"""The guidelines of a judge of `srpo.train_judge`: kept in its folder, and what a run asks it with."""

from __future__ import annotations

import json
from pathlib import Path

from srpo.core.config.train import RewardConfig
from srpo.core.errors import UserError
from srpo.core.files import write_whole
from srpo.core.jsonl import json_file
from srpo.data.chat import say
from srpo.data.prompts import read_guidelines

GUIDELINES = "guidelines.json"  # in the folder of a trained judge


def judge_files(guidelines: str) -> dict[str, str]:
    """The file, {name: text}, that tells how a judge was asked in its training."""
    return {GUIDELINES: json.dumps({"guidelines": guidelines}, ensure_ascii=False, indent=1) + "\n"}


def keep_guidelines(run_dir: Path, guidelines: str) -> dict[str, str]:
    """`judge_files`, after writing them to the folder of a judge's training, from which `srpo.export` takes them."""
    files = judge_files(guidelines)
    for name, text in files.items():
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / name).is_file() or (run_dir / name).read_text(encoding="utf-8") != text:
            write_whole(run_dir / name, text)
    return files


def kept_files(run_dir: Path) -> dict[str, str]:
    """What `keep_guidelines` has written there; nothing for a run that is not a judge's. Raises UserError for a damaged file."""
    guidelines = trained_guidelines(str(run_dir))
    return {} if guidelines is None else judge_files(guidelines)


def trained_guidelines(folder: str) -> str | None:
    """The text that the prompts of a judge began with in its training, "" for none; None if its folder does not tell.

    Raises UserError for a damaged file.
    """
    path = Path(folder) / GUIDELINES
    if not folder or not path.is_file():
        return None
    text = json_file(path).get("guidelines")
    if not isinstance(text, str):
        raise UserError(f"{path} is damaged (it has no text `guidelines`): restore it, or train the judge again")
    return text


def guidelines_of(cfg: RewardConfig) -> str:
    """The text that the judge's prompts begin with: that of `reward.judge_guidelines`, else that of its training.

    Says once if they differ. Raises UserError as `read_guidelines` and `trained_guidelines` do.
    """
    trained, given = trained_guidelines(cfg.judge_path), read_guidelines(cfg.judge_guidelines, "reward.judge_guidelines")
    if trained is None or trained == given:
        return given
    if not cfg.judge_guidelines:
        return trained
    whose = "those that it was trained with" if trained else "none, as it was trained"
    say(
        f"the judge in {cfg.judge_path} is asked with the guidelines of {cfg.judge_guidelines} (reward.judge_guidelines), not "
        f"with {whose}: leave reward.judge_guidelines empty to ask it as in its training"
    )
    return given
