"""`python -m srpo.convert` from end to end, on a tiny GGUF file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from gguf_file import write_gguf
from transformers import AutoModelForCausalLM

from srpo.convert import main
from srpo.core.config.convert import ConvertConfig
from srpo.core.errors import UserError


def test_a_file_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "a.gguf", tmp_path / "model"
    write_gguf(file)
    main(ConvertConfig(source=str(file), out=str(out), dtype="bfloat16"))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{file}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert second == f"{out}: a model of type llama in bfloat16, for policy.path"
    assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("config", "words"),
    [(ConvertConfig(), "name a GGUF file, or a package with one"), (ConvertConfig(source="a"), "no folder for the model")],
)
def test_both_names_are_needed(config: ConvertConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        main(config)
