"""The answers of a tokenizer without special tokens to `srpo.data.encoding`: the base of tests' own tokenizers."""

from __future__ import annotations

from typing import Any, ClassVar


class PlainTokenizer:
    chat_template = bos_token_id = eos_token_id = pad_token_id = unk_token_id = None
    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    init_kwargs: ClassVar[dict[str, Any]] = {}

    def __len__(self) -> int:
        return 0
