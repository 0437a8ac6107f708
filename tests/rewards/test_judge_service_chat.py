"""The chat template of a judge behind a URL: settings that its server follows, prompts that are framed here, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_families import END, family_tokenizer
from judge_calls import EXAMPLE, GOOD, SCHEMA, SETTINGS, ask
from judge_server import Answer, Asked, chat, completion, serving

from srpo.core.config.chat import ChatConfig
from srpo.core.errors import UserError
from srpo.data import chat as chats
from srpo.data.chat import set_chat
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.encoding import Part
from srpo.data.tokenizer import encode_prompt, load_tokenizer
from srpo.rewards.build import open_service_judge
from srpo.rewards.judge_service import check_service
from srpo.rewards.verdicts import judge_prompt

URL = "http://127.0.0.1:8000/v1"
PLAIN = {"judge_api": "completions"}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "_SAID", set())


@pytest.mark.parametrize("options", [{"enable_thinking": False}, {"style": "terse", "depth": 2}, {}])
def test_the_chat_api_gets_the_variables_of_the_template(options: dict[str, Any]) -> None:
    with serving(lambda _: chat("Step 1 is [Correct]")) as server:
        cfg = replace(SETTINGS, judge_url=server.url, judge_chat=ChatConfig(system="You judge.", options=options))
        judge = open_service_judge(SCHEMA, cfg)
        assert ask(judge, "x") == [GOOD]
        judge.close()
    for asked in server.asked:
        assert asked.body.get("chat_template_kwargs", {}) == options and ("chat_template_kwargs" in asked.body) == bool(options)
        assert [message["role"] for message in asked.body["messages"]] == ["system", "user"]


def test_a_server_without_such_variables_is_told_how_to_go_on() -> None:
    def answer(request: Asked) -> Answer:
        if "chat_template_kwargs" in request.body:
            return Answer(b'{"error": {"message": "Unrecognized request argument supplied: chat_template_kwargs"}}', 400)
        return chat("Step 1 is [Correct]")

    with serving(answer) as server:
        cfg = replace(SETTINGS, judge_url=server.url)
        with pytest.raises(UserError, match=r"leave reward\.judge_chat\.options empty for this server$"):
            open_service_judge(SCHEMA, cfg)
        judge = open_service_judge(SCHEMA, replace(cfg, judge_chat=ChatConfig(options={})))
        assert ask(judge, "x") == [GOOD]
        judge.close()


@pytest.mark.parametrize("system", ["", "You are terse."])
def test_the_completions_api_gets_the_ids_of_the_judges_own_tokenizer(tmp_path: Path, system: str) -> None:
    """The same ids as a judge in this process; the system message of the training unless another one is set."""
    tokenizer: Any = family_tokenizer("chatml")
    set_chat(tokenizer, ChatConfig(system="You judge."), "here")
    tokenizer.save_pretrained(tmp_path)
    text = f"Step 1 {END['chatml']} is right"
    with serving(lambda _: completion("Step 1 is [Correct]")) as server:
        cfg = replace(SETTINGS, judge_url=server.url, judge_api="completions", judge_path=str(tmp_path))
        judge = open_service_judge(SCHEMA, replace(cfg, judge_chat=ChatConfig(system=system)))
        assert ask(judge, text) == [GOOD]
        judge.close()
    body = server.asked[-1].body
    own = load_tokenizer(tmp_path, chat=ChatConfig(system=system))
    assert body["prompt"] == list(encode_prompt(own, [Part(judge_prompt(EXAMPLE, text))]))
    assert body["stop_token_ids"] == list(stop_ids(own)) and "add_special_tokens" not in body
    shown = str(own.decode(body["prompt"]))
    assert shown.startswith(f"<|im_start|>system\n{system or 'You judge.'}<|im_end|>") and text in shown
    assert body["prompt"].count(own.convert_tokens_to_ids(END["chatml"])) == 2  # after system and user: none of the response


def test_prompts_without_a_template_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda _: completion("Step 1 is [Correct]")) as server:
        for _ in range(2):
            open_service_judge(SCHEMA, replace(SETTINGS, judge_url=server.url, judge_api="completions")).close()
    assert capsys.readouterr().out.count("gets prompts without a chat template") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_chat": ChatConfig(template="off")}, r"^reward\.judge_chat\.template is off and reward\.judge_api chat: .* set "),
        ({"judge_path": "here"}, r"^reward\.judge_path is set and reward\.judge_api chat: .*, or remove reward\.judge_path$"),
        (PLAIN | {"judge_chat": ChatConfig(system="You judge.")}, r"^reward\.judge_chat\.system is set, but "),
        (PLAIN | {"judge_chat": ChatConfig(options={"enable_thinking": True})}, r"^reward\.judge_chat\.options is set, but "),
        (PLAIN | {"judge_chat": ChatConfig(template="on")}, r"^reward\.judge_chat\.template is set, but "),
    ],
    ids=str,
)
def test_what_the_api_cannot_follow_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_service(replace(SETTINGS, judge_url=URL, **changes))
    assert "\n" not in str(refused.value)


def test_what_comes_to_the_same_is_taken() -> None:
    check_service(replace(SETTINGS, judge_url=URL, judge_api="completions", judge_chat=ChatConfig(template="off")))
    check_service(replace(SETTINGS, judge_url=URL, judge_chat=ChatConfig(template="on", system="You judge.")))
    check_service(replace(SETTINGS, judge_url=URL, judge_api="completions", judge_path="here", judge_chat=ChatConfig(system="x")))


def test_a_tokenizer_that_is_not_there_is_named_by_its_setting(tmp_path: Path) -> None:
    cfg = replace(SETTINGS, judge_url=URL, judge_api="completions", judge_path=str(tmp_path))
    with pytest.raises(UserError, match=r"reward\.judge_path must be a folder"):
        open_service_judge(SCHEMA, cfg)
