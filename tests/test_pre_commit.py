"""The hook on commit subjects, which `pre-commit install` installs together with the others."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

CONFIG = yaml.safe_load((Path(__file__).resolve().parents[1] / ".pre-commit-config.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("length", "code"), [(1, 0), (72, 0), (73, 1), (0, 1)])
def test_a_commit_subject_has_at_most_72_characters(length: int, code: int, tmp_path: Path) -> None:
    (hook,) = [hook for repo in CONFIG["repos"] for hook in repo["hooks"] if hook["id"] == "commit-subject"]
    assert hook["stages"] == ["commit-msg"] and "commit-msg" in CONFIG["default_install_hook_types"]
    path = tmp_path / "COMMIT_EDITMSG"
    path.write_text("s" * length + "\n\n" + "b" * 100 + "\n", encoding="utf-8")
    done = subprocess.run([*shlex.split(hook["entry"]), str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, "shorten the first line" in done.stdout) == (code, bool(code))
