"""Tokenizers: train a small byte-level one on given texts, or load the one of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from srpo.core.config.chat import ChatConfig
from srpo.core.errors import UserError
from srpo.core.files import check_not_adapter
from srpo.data.chat import frame_of, framed, set_chat
from srpo.data.checkpoint_tokens import check_rows
from srpo.data.encoding import BOS_KEY, Part, encode_parts, set_bos, with_bos
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm

EOS, PAD = "<|end|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, phrases: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with an end-of-text and a padding token. Any text round-trips.

    `phrases` become one token each: step headers and the fixed parts of a prompt would otherwise be most of a small model's
    tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    phrases = list(phrases)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False, model_max_length=1_000_000
    )


def load_tokenizer(path: str | Path, bos: str = "tokenizer", chat: ChatConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of a checkpoint, with `policy.bos` and `policy.chat` applied. Code in the folder never runs.

    UserError if the folder has none, if its files cannot be read, if it has no end-of-text token, or if it has more ids than the
    model in the folder.
    """
    check_not_adapter(path)
    if not str(path):
        raise UserError("policy.path is not set: name the folder of a Hugging Face checkpoint with its tokenizer")
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(
            f"no tokenizer in {str(path)!r}: policy.path must be a folder of a Hugging Face checkpoint with its tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:
        reason = _reason(error)
        raise UserError(
            f"{Path(path) / 'config.json'} is not the config of a model that transformers knows ({reason}): correct it"
        ) from error
    except Exception as error:  # the class that tokenizers raises for a damaged tokenizer.json
        reason = _reason(error)
        raise UserError(f"the tokenizer in {str(path)!r} cannot be loaded ({reason}): restore it") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no end-of-text token: set eos_token in its tokenizer_config.json")
    check_rows(tokenizer, path)
    set_bos(tokenizer, bos)
    set_chat(tokenizer, chat or ChatConfig(), str(path))
    return tokenizer


def _reason(error: Exception) -> str:
    """One line of a library's error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text of the data, such as a response, without special tokens."""
    return encode_parts(tokenizer, [Part(text)])


def encode_prompt(tokenizer: Any, parts: Sequence[Part]) -> tuple[int, ...]:
    """Token ids of a prompt, in the chat template if that is used; only the templates' special tokens are special.

    Begins with a BOS if `adds_bos`; after a chat template only if `policy.bos` is "add", since the template writes its own.
    """
    ids = encode_parts(tokenizer, framed(tokenizer, parts))
    chats = frame_of(tokenizer) is not None
    return ids if chats and not tokenizer.init_kwargs.get(BOS_KEY) else with_bos(tokenizer, ids)


def encode_prompts(tokenizer: Any, examples: Sequence[Example], form: PromptForm) -> list[tuple[int, ...]]:
    """Token ids of the policy's prompt of each example. Raises UserError like `prompt_parts`."""
    return [encode_prompt(tokenizer, form.parts(example, attacked=True)) for example in examples]
