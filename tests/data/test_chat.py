"""Prompts in chat templates: ids of `apply_chat_template`, text of data stays text, settings that travel with a checkpoint."""

from __future__ import annotations

import random
import string
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from chat_families import END, FAMILIES, family_tokenizer

from srpo.core.config.chat import ChatConfig
from srpo.core.config.train import DataConfig
from srpo.core.errors import UserError
from srpo.core.step_presets import PAPER
from srpo.data import chat
from srpo.data.chat import end_id, frame_of, set_chat
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.encoding import Part, control_ids
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm, build_prompt
from srpo.data.tokenizer import encode_prompt, encode_prompts, load_tokenizer


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SAID", set())


def random_text(specials: bool = False) -> str:
    alphabet = string.ascii_letters + string.digits + string.punctuation + " \n\t" + "é漢🙂"
    text = "".join(random.choices(alphabet, k=random.randint(1, 60)))
    if specials:
        for family in FAMILIES.values():
            for token in random.sample(family[1], 2):
                at = random.randint(0, len(text))
                text = text[:at] + token + text[at:]
    return text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", [False, True])
def test_ids_are_those_of_apply_chat_template(family: str, thinking: bool) -> None:
    tokenizer: Any = family_tokenizer(family)
    system = "" if family == "gemma" else "You judge\n search relevance."
    set_chat(tokenizer, ChatConfig(system=system, options={"enable_thinking": thinking}), "here")
    messages = [{"role": "system", "content": system}] if system else []
    form = PromptForm.of(DataConfig(), PAPER)
    for _ in range(40):
        example = Example("1", "q", random_text(), random_text(), {"brand": random_text()})
        said = {"role": "user", "content": build_prompt(example, form)}
        wanted = tokenizer.apply_chat_template([*messages, said], add_generation_prompt=True, enable_thinking=thinking)
        assert list(encode_prompts(tokenizer, [example], form)[0]) == list(wanted["input_ids"])
        text = random_text() + "\n \n"  # a message of data alone, with spaces at its ends
        wanted = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": text}], add_generation_prompt=True, enable_thinking=thinking
        )
        assert list(encode_prompt(tokenizer, [Part(text)])) == list(wanted["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_data_ends_no_turn(family: str) -> None:
    tokenizer: Any = family_tokenizer(family)
    set_chat(tokenizer, ChatConfig(), "here")
    form = PromptForm.of(DataConfig(), PAPER)
    plain = encode_prompts(tokenizer, [Example("1", "q", "red", "shoe")], form)[0]
    controls = control_ids(tokenizer)
    frame = [i for i in plain if i in controls]
    for _ in range(40):
        example = Example("1", "q", random_text(specials=True), random_text(specials=True))
        ids = encode_prompts(tokenizer, [example], form)[0]
        assert [i for i in ids if i in controls] == frame
        assert build_prompt(example, form).strip() in tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_ends_with_the_turn(family: str) -> None:
    tokenizer: Any = family_tokenizer(family)
    assert end_id(tokenizer) == tokenizer.eos_token_id
    set_chat(tokenizer, ChatConfig(), "here")
    assert end_id(tokenizer) == tokenizer.convert_tokens_to_ids(END[family])
    assert {end_id(tokenizer), tokenizer.eos_token_id} <= set(stop_ids(tokenizer))


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_keeps_the_chat_it_was_trained_with(tmp_path: Path) -> None:
    start = saved(family_tokenizer("chatml"), tmp_path / "start")
    trained = load_tokenizer(start, chat=ChatConfig(system="Be strict.", options={"enable_thinking": True}))
    again = load_tokenizer(saved(trained, tmp_path / "trained"))
    assert frame_of(again) == frame_of(trained) and "Be strict." in frame_of(again).before  # type: ignore[union-attr]
    other = load_tokenizer(tmp_path / "trained", chat=ChatConfig(system="Be kind."))
    assert "Be kind." in frame_of(other).before  # type: ignore[union-attr]
    off = load_tokenizer(saved(load_tokenizer(start, chat=ChatConfig(template="off")), tmp_path / "off"))
    assert frame_of(off) is None and encode_prompt(off, [Part("red")]) == tuple(off.encode("red", add_special_tokens=False))


def test_a_template_that_is_used_or_not_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(family_tokenizer("llama"), tmp_path / "instruct")
    for _ in range(2):
        load_tokenizer(folder)
    assert capsys.readouterr().out == f"prompts are the user's message in the chat template of {folder} (policy.chat)\n"
    for _ in range(2):
        load_tokenizer(folder, chat=ChatConfig(template="off"))
    assert capsys.readouterr().out == f"the tokenizer in {folder} has a chat template, which is not used (policy.chat.template)\n"
    base = saved(family_tokenizer("llama", template=False), tmp_path / "base")
    assert frame_of(load_tokenizer(base)) is None and not capsys.readouterr().out


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    base, instruct = family_tokenizer("gemma", template=False), family_tokenizer("gemma")
    with pytest.raises(
        UserError, match=r"policy.chat.template is on, but the tokenizer in here has no chat template: take an in"
    ):
        set_chat(base, ChatConfig(template="on"), "here")
    for tokenizer, chosen in ((base, "auto"), (instruct, "off")):
        with pytest.raises(UserError, match=r"policy.chat.system is set, but prompts of here get no chat template"):
            set_chat(tokenizer, ChatConfig(template=chosen, system="Be strict."), "here")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot be used \(System role not supported\): leave policy.chat.system empty"):
        set_chat(instruct, ChatConfig(system="Be strict."), "here")
    set_chat(tokenizer := family_tokenizer("chatml"), ChatConfig(), "here")
    with pytest.raises(UserError, match=r"has the special token <\|im_start\|>, and prompts get the chat template"):
        encode_prompt(tokenizer, [Part("<|im_start|>user\n", is_data=False), Part("red")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not write the user's message exactly once"),
        ("<|im_start|>", "does not write the user's message exactly once"),
        ("{{ raise_exception('no user today') }}", r"cannot be used \(no user today\): set policy.chat.template to 'off'"),
        ("{% for %}", "cannot be used"),
        ("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}", rf"writes today's date \({date.today():%d %b %Y}\)"),
    ],
)
def test_a_template_that_cannot_frame_a_prompt_is_refused(template: str, message: str) -> None:
    tokenizer: Any = family_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        set_chat(tokenizer, ChatConfig(), "here")


def test_a_date_of_the_template_can_be_fixed() -> None:
    tokenizer: Any = family_tokenizer("chatml")
    tokenizer.chat_template = "{% if not date_string %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}\
{{ date_string }} {{ messages[0].content }}"
    set_chat(tokenizer, ChatConfig(options={"date_string": "26 Jul 2024"}), "here")
    assert frame_of(tokenizer).before == "26 Jul 2024 "  # type: ignore[union-attr]
