"""Chat templates: a prompt as the user's message of a conversation, by the tokenizer's own template (`policy.chat`).

The template is rendered once around a mark, and its text before and after the mark frames every prompt. Text of the data thus
stays data (`srpo.data.encoding`), and the ids are those of `tokenizer.apply_chat_template(..., add_generation_prompt=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from srpo.core.config.chat import ChatConfig
from srpo.core.errors import UserError
from srpo.data.encoding import Part, control_ids

CHAT_KEY = "srpo_chat"  # in tokenizer_config.json: the `policy.chat` that a checkpoint was trained with
_MARK = "\ue000"  # a private-use character: no template writes one
_SAID: set[str] = set()


@dataclass(frozen=True)
class Frame:
    """Text that the chat template writes around the user's message, and after an answer."""

    before: str
    after: str
    trims: bool  # whether the template removes spaces at the ends of the message
    end_id: int | None  # special token after an answer; None if the template writes none

    def around(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of a prompt as the user's message."""
        inner = list(parts)
        while self.trims and inner and not inner[0].text.strip():
            inner.pop(0)
        while self.trims and inner and not inner[-1].text.strip():
            inner.pop()
        if self.trims and inner:
            inner[0] = Part(inner[0].text.lstrip(), inner[0].is_data)
            inner[-1] = Part(inner[-1].text.rstrip(), inner[-1].is_data)
        return [Part(self.before, is_data=False), *inner, Part(self.after, is_data=False)]


_FRAMES: WeakKeyDictionary[Any, tuple[Any, Frame | None]] = WeakKeyDictionary()


def set_chat(tokenizer: Any, chat: ChatConfig, name: str) -> None:
    """Apply `policy.chat`, which is kept in the tokenizer and saved with it; says once whether a template that is there is used.

    A trained checkpoint keeps the settings that it was trained with; each that differs from its default replaces one. `name` is
    the tokenizer's folder. Raises UserError for a template that is asked for and missing, or cannot be used.
    """
    template, known = tokenizer.chat_template, tokenizer.init_kwargs.get(CHAT_KEY)
    if chat.template == "on" and not template:
        raise UserError(
            f"policy.chat.template is on, but the tokenizer in {name} has no chat template: take an instruct model, add "
            "chat_template.jinja to the folder, or set policy.chat.template to 'auto'"
        )
    if (known is None and template) or chat != ChatConfig():
        if known is not None and chat.template != "off":  # a setting with its default value keeps the checkpoint's
            default = ChatConfig()
            kept = {"template": "on" if known["used"] else "off", "system": known["system"], "options": known["options"]}
            chat = replace(chat, **{key: kept[key] for key in kept if getattr(chat, key) == getattr(default, key)})
        used = bool(template) and chat.template != "off"
        if chat.system and not used:
            raise UserError(
                f"policy.chat.system is set, but prompts of {name} get no chat template: set policy.chat.template to 'on', or "
                "put the text into data.prompt"
            )
        tokenizer.init_kwargs[CHAT_KEY] = {"used": used, "system": chat.system, "options": dict(chat.options)}
    if template:
        used = frame_of(tokenizer) is not None
        say(
            f"prompts are the user's message in the chat template of {name} (policy.chat)"
            if used
            else f"the tokenizer in {name} has a chat template, which is not used (policy.chat.template)"
        )


def frame_of(tokenizer: Any) -> Frame | None:
    """The frame of the tokenizer's prompts, as `set_chat` chose; None if they have no chat template."""
    settings = getattr(tokenizer, "init_kwargs", {}).get(CHAT_KEY)
    if not settings or not settings["used"]:
        return None
    key = (settings, tokenizer.chat_template)
    known = _FRAMES.get(tokenizer)
    if known is None or known[0] != key:
        known = _FRAMES[tokenizer] = key, _frame(tokenizer, settings["system"], settings["options"])
    return known[1]


def end_id(tokenizer: Any) -> Any:
    """The token that ends a response: the one that the chat template writes after an answer, else the end of text."""
    frame = frame_of(tokenizer)
    return getattr(tokenizer, "eos_token_id", None) if frame is None or frame.end_id is None else frame.end_id


def framed(tokenizer: Any, parts: Sequence[Part]) -> list[Part]:
    """The parts of a prompt in the tokenizer's chat template, if it has one that is used.

    Raises UserError for a prompt whose template has special tokens itself, which would be a chat inside a chat.
    """
    frame = frame_of(tokenizer)
    if frame is None:
        return list(parts)
    controls = [str(tokenizer.convert_ids_to_tokens(i)) for i in control_ids(tokenizer)]
    for part in parts:
        if not part.is_data and (named := next((token for token in controls if token in part.text), None)):
            raise UserError(
                f"the prompt's template has the special token {named}, and prompts get the chat template of the tokenizer around "
                "them: remove the special tokens from the template, or set policy.chat.template to 'off'"
            )
    return frame.around(parts)


def _frame(tokenizer: Any, system: str, options: dict[str, Any]) -> Frame:
    before, _, after = _render(tokenizer, system, _MARK, options).partition(_MARK)
    spaced = _render(tokenizer, system, f" {_MARK} ", options)
    if spaced.count(_MARK) != 1 or _MARK in after:
        raise UserError(
            "the tokenizer's chat template does not write the user's message exactly once: set policy.chat.template to 'off'"
        )
    trims = f" {_MARK} " not in spaced
    today = [date.today().strftime(form) for form in ("%d %b %Y", "%d %B %Y", "%B %d, %Y", "%Y-%m-%d")]
    if shown := next((day for day in today if day in before + after), None):
        raise UserError(
            f"the tokenizer's chat template writes today's date ({shown}) into every prompt, so that a run that goes on tomorrow "
            'gets others: fix it in policy.chat.options, as in date_string = "26 Jul 2024", if the template has such a variable'
        )
    answered = _render(tokenizer, system, _MARK, options, answer=f"answer{_MARK}").rpartition(_MARK)[2]
    ids = tokenizer.encode(answered, add_special_tokens=False)
    controls = control_ids(tokenizer)
    return Frame(before, after, trims, next((i for i in ids if i in controls), None))


def _render(tokenizer: Any, system: str, message: str, options: dict[str, Any], answer: str | None = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None, **options)
    except (TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = (
            "leave policy.chat.system empty and put its text into data.prompt" if system else "set policy.chat.template to 'off'"
        )
        raise UserError(f"the tokenizer's chat template cannot be used ({reason}): {hint}") from error


def say(text: str) -> None:
    """Print a line once per process, on the main rank."""
    if text not in _SAID and int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
    _SAID.add(text)
