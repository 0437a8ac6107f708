"""srpo.rewards.judge_service when it starts and ends: model name, key, outages, settings, threads."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from judge_calls import GOOD, KEY, SCHEMA, SETTINGS, SILENT, ask, counts
from judge_server import Answer, Asked, chat, free_port, models, serving

from srpo.rewards.build import open_service_judge
from srpo.rewards.judge_service import JudgeService, JudgeServiceError


def test_opening_asks_for_the_name_and_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    names = ["the-judge"]

    def answer(request: Asked) -> Answer:
        return models(*names) if request.path == "/v1/models" else chat("Step 1 is [Correct]")

    with serving(answer) as server:
        cfg = replace(SETTINGS, judge_url=server.url + "/", judge_model="")
        judge = open_service_judge(SCHEMA, cfg)
        assert [(a.method, a.path) for a in server.asked] == [("GET", "/v1/models"), ("POST", "/v1/chat/completions")]
        assert server.asked[1].body["model"] == "the-judge" and server.asked[1].body["max_tokens"] == 1
        assert {a.headers["Authorization"] for a in server.asked} == {f"Bearer {KEY}"}
        assert counts(judge) == {} and ask(judge, "x") == [GOOD]
        judge.close()
        for served, message in ((["a", "b\x1b[31m"], "serves 2 models: .* one of them: a, b"), ([], "serves 0 models: .* none")):
            names[:] = served
            with pytest.raises(JudgeServiceError, match=message):
                open_service_judge(SCHEMA, cfg)
    with pytest.raises(JudgeServiceError, match="gave no answer in 3 attempts"):
        open_service_judge(SCHEMA, cfg)
    with (
        serving(lambda request: Answer(b"too long", 400)) as server,
        pytest.raises(JudgeServiceError, match="HTTP 400 'too long'"),
    ):
        open_service_judge(SCHEMA, replace(cfg, judge_url=server.url))


@pytest.mark.parametrize("fallback", ["stop", "missing"])
def test_opening_finds_a_wrong_key_and_bears_an_outage_if_it_may(fallback: str) -> None:
    cfg = replace(SETTINGS, judge_fallback=fallback)
    with serving(lambda request: Answer(b'{"message": "wrong key"}', 401)) as server:
        with pytest.raises(JudgeServiceError, match="HTTP 401"):
            open_service_judge(SCHEMA, replace(cfg, judge_url=server.url))
        assert len(server.asked) == 1
    port = free_port()
    cfg = replace(cfg, judge_url=f"http://127.0.0.1:{port}/v1")
    if fallback == "stop":
        with pytest.raises(JudgeServiceError, match="gave no answer"):
            open_service_judge(SCHEMA, cfg)
        return
    with pytest.warns(RuntimeWarning, match="the run starts without it"):
        judge = open_service_judge(SCHEMA, cfg)
    assert ask(judge, "x") == [SILENT]
    with serving(lambda request: chat("Step 1 is [Correct]"), port):
        assert ask(judge, "x") == [GOOD]
    judge.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_url": "127.0.0.1:8000/v1"}, "not the address"),
        ({"judge_url": "file:///etc/passwd"}, "not the address"),
        ({"judge_url": "http://"}, "not the address"),
        ({"judge_url": "http://[::1"}, "not the address"),
        ({"judge_url": "http://h:99999/v1"}, "not the address"),
        ({"judge_url": "http://127.0.0.1/v1/chat/completions"}, "the path of a call"),
        ({"judge_concurrency": 0}, "judge_concurrency is 0"),
        ({"judge_retries": -1}, "judge_retries is -1"),
        ({"judge_timeout_s": 0.0}, r"judge_timeout_s is 0\.0"),
        ({"judge_backoff_s": float("nan")}, "judge_backoff_s is nan"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeService(replace(SETTINGS, **{"judge_url": "http://127.0.0.1/v1", **changes}))


def test_a_service_that_nobody_holds_ends_its_thread() -> None:
    def threads() -> int:
        return sum(thread.name == "judge-service" for thread in threading.enumerate())

    before = threads()
    with serving(lambda request: chat("Step 1 is [Correct]")) as server:
        judge = open_service_judge(SCHEMA, replace(SETTINGS, judge_url=server.url))
        assert ask(judge, "x") == [GOOD] and threads() == before + 1
        del judge
        until = time.monotonic() + 20
        while threads() > before and time.monotonic() < until:
            time.sleep(0.01)
        assert threads() == before
