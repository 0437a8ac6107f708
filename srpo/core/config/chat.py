"""Settings of the chat template around prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from srpo.core.mappings import Values


@dataclass(frozen=True)
class ChatConfig:
    """How a prompt becomes the user's message of a conversation; saved with the tokenizer of a checkpoint."""

    # Put prompts into the tokenizer's chat template: if it has one (auto; a trained checkpoint: as in training), always, or never
    template: Literal["auto", "on", "off"] = "auto"
    system: str = ""  # system message before the prompt; empty: none, or the one that the template has by itself
    # Variables of the template, such as enable_thinking = false, so that responses begin with their first step
    options: Values = field(default_factory=lambda: {"enable_thinking": False})
