"""The judge behind an OpenAI-compatible URL (`vllm serve` and many others): parallel calls, retries, fallback."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from srpo.core.config.chat import ChatConfig
from srpo.core.config.train import RewardConfig
from srpo.core.errors import UserError
from srpo.core.interrupts import at_interrupt
from srpo.core.ranges import check_ranges
from srpo.data.chat import say
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.encoding import Part, without_special_text
from srpo.data.tokenizer import encode_prompt
from srpo.rewards.http_reply import (
    MAX_REPLY_BYTES,
    NO_ADDRESS,
    NotAReply,
    checked_key,
    checked_url,
    is_loopback,
    pause_s,
    printable,
    read_models,
    read_text,
    retry_after_s,
    safe,
    says_too_long,
    server_message,
)
from srpo.rewards.verdict_cache import WorkCounts
from srpo.rollout.engine import SamplingParams

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
TRIED_AGAIN = (408, 409, 429)  # HTTP statuses that are retried, as are 5xx and a missing answer
OF_THE_TEXT = (400, 413, 422)  # HTTP statuses that object to this prompt; the next prompt may pass
VARIABLES = "chat_template_kwargs"  # field for the variables of a chat template, in the servers of vLLM and SGLang
USE_FALLBACK = "set reward.judge_fallback = 'missing' to continue without its verdicts"


class JudgeServiceError(UserError):
    """The judge's server failed or refused; the message names the fix."""


class _NoAnswer(Exception):
    """An attempt failed; a retry may succeed."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # from the server's Retry-After


class _Refused(Exception):
    """The server refused; a retry would be refused, too."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class _TooLong(Exception):
    """The prompt does not fit into the judge's context."""


class JudgeService:
    """A `srpo.rewards.judge.Writer` on a server. All threads together have at most `reward.judge_concurrency` open calls.

    Retries: an attempt fails without connection, without a complete answer within `judge_timeout_s`, with HTTP 408, 409, 429 or
    5xx, and with an unreadable answer. It is retried up to `judge_retries` times. Pauses double from `judge_backoff_s`, are at
    least the server's Retry-After, and at most a minute each. Then `judge_fallback` decides: "stop" raises JudgeServiceError,
    "missing" gives no text and counts the call.
    Outages: if a call fails in all attempts while no other succeeds, the server counts as down. Open calls are given up and new
    calls get one attempt, until one succeeds, so that an outage costs one series of pauses, not one per response.
    Refusals: any other 4xx and any redirect raise JudgeServiceError at once; redirects are never followed. 400, 413 and 422
    object to one prompt and follow `judge_fallback`; if the reply states that the prompt is too long, the call gives no text.

    A reply may hold any text of up to MAX_REPLY_BYTES: `parse_verdicts` is total. The key is sent in one header only, and removed
    from the server's messages before they are shown.
    Prompts: the chat API puts them into the server's chat template, with `judge_chat`. The completions API gets token ids in the
    frame of `tokenizer`, the judge's own, or without a tokenizer the plain text.
    Raises UserError for an address, a key or settings that cannot work.
    """

    def __init__(self, cfg: RewardConfig, *, tokenizer: Any = None, api_key: str = "", seed: int | None = None) -> None:
        check_service(cfg)
        self._cfg = cfg
        self._url = checked_url(cfg.judge_url)
        try:
            known = httpx2.URL(self._url)
        except httpx2.InvalidURL as error:
            raise UserError(NO_ADDRESS) from error
        if (known.scheme, known.host) != (urlsplit(self._url).scheme, urlsplit(self._url).hostname):
            raise UserError(NO_ADDRESS)  # the client would call another host than the one that was checked
        self._key = checked_key(api_key)
        self._model = cfg.judge_model
        self._tokenizer, self._encoding = tokenizer, threading.Lock()
        self._work = WorkCounts()
        self._random = random.Random(seed)  # own generator: pauses must not change the run's random numbers
        self._down_at = self._answered_at = float("-inf")
        self._last_failure = ""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # no compression, so no decompression bomb
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # `_tried` limits each attempt as a whole
            follow_redirects=False,
            trust_env=not is_loopback(self._url),  # no proxy for loopback addresses
            limits=httpx2.Limits(max_connections=cfg.judge_concurrency, max_keepalive_connections=cfg.judge_concurrency),
        )
        self._slots = asyncio.Semaphore(cfg.judge_concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop, self._client), name="judge-service", daemon=True)
        self._thread.start()
        # The garbage collector may drop a service on any thread, also on its own or another service's: it waits for none.
        self._end = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @property
    def identity(self) -> str:
        return f"{self._url} {self._model} {self._cfg.judge_api}"

    @property
    def work(self) -> WorkCounts:
        return self._work

    def start(self) -> None:
        """Look up the model's name if `reward.judge_model` is empty, and request one token.

        Raises JudgeServiceError if the server refuses or does not answer. With `judge_fallback` "missing" and a known model name
        a missing answer is only a warning.
        """
        if self._key and self._url.startswith("http:") and not is_loopback(self._url):
            warnings.warn(
                "the key in OPENAI_API_KEY is sent over http, which others on the way can read: set reward.judge_url to an https "
                "address, or unset OPENAI_API_KEY if the judge needs no key",
                RuntimeWarning,
                stacklevel=3,
            )
        if self._cfg.judge_api == "completions" and self._tokenizer is None:
            say(
                f"the judge at {self._url} gets prompts without a chat template (reward.judge_api completions): if it was "
                "trained with one, set reward.judge_path to its folder"
            )
        if not self._model:
            self._model = self._only_model()
        try:
            self._wait(self._call(self._body("Query", 1, 0.0, 0, 0)))
        except _TooLong:  # for a prompt of one word: the server works, and too long prompts of the run are counted
            pass
        except _Refused as refusal:
            takes_none = bool(self._cfg.judge_chat.options) and VARIABLES in str(refusal)
            hint = "leave reward.judge_chat.options empty for this server" if takes_none else "check the reward.judge_* settings"
            raise self._stopped(str(refusal), hint) from refusal
        except _NoAnswer as failure:
            if self._cfg.judge_fallback == "stop":
                raise self._failed(failure) from failure
            warnings.warn(f"{self._failed(failure)}; the run starts without it", RuntimeWarning, stacklevel=3)
        self._work.take()

    def _only_model(self) -> str:
        try:
            models = self._wait(self._tried(self._models))
        except _Refused as refusal:
            raise self._stopped(str(refusal), "check reward.judge_url, or set reward.judge_model") from refusal
        except _NoAnswer as failure:
            raise self._failed(failure) from failure
        if len(models) != 1:
            names = ", ".join(printable(name, self._key) for name in models[:20])
            raise JudgeServiceError(
                f"the judge at {self._url} serves {len(models)} models: set reward.judge_model to one of them: "
                f"{self._safe(names) or 'none'}"
            )
        return models[0]

    def write(self, prompts: Sequence[str], params: SamplingParams, seed: int) -> list[list[str | None]]:
        """Return `params.group_size` texts per prompt, one call each. Raises JudgeServiceError as `judge_fallback` decides."""
        temperature = 0.0 if params.greedy else params.temperature
        bodies = [
            self._body(prompt, params.max_new_tokens, temperature, params.top_k, seed + number)
            for prompt in prompts
            for number in range(params.group_size)
        ]
        texts = self._wait(self._all(bodies))
        return [texts[i : i + params.group_size] for i in range(0, len(texts), params.group_size)]

    def _body(self, prompt: str, max_tokens: int, temperature: float, top_k: int, seed: int) -> bytes:
        body: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        if top_k and temperature:
            body["top_k"] = top_k
        if self._tokenizer is not None:
            with self._encoding:  # the judge's own threads call, too
                ids = encode_prompt(self._tokenizer, [Part(prompt)])
            body |= {"prompt": list(ids), "stop_token_ids": list(stop_ids(self._tokenizer))}
            return json.dumps(body).encode("ascii")
        prompt = without_special_text(prompt)  # the server's tokenizer is not known, and it splits no special tokens
        if self._cfg.judge_api == "chat":
            system, options = self._cfg.judge_chat.system, self._cfg.judge_chat.options
            begin = [{"role": "system", "content": system}] if system else []
            body["messages"] = [*begin, {"role": "user", "content": prompt}]
            body |= {VARIABLES: dict(options)} if options else {}
        else:
            body |= {"prompt": prompt, "add_special_tokens": True}  # a BOS if the tokenizer adds one, as srpo.train_judge does
        return json.dumps(body).encode("ascii")

    def _wait(self, work: Any) -> Any:
        """Run a coroutine on the service's thread and return its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        forget = at_interrupt(future.cancel)  # another thread than the interrupted one may be waiting here
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            forget()

    # ---- on the service's thread ---------------------------------------------------------------------------------------------

    async def _all(self, bodies: Sequence[bytes]) -> list[str | None]:
        tasks = [asyncio.create_task(self._text(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:  # after an error in one call, cancel the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _text(self, body: bytes) -> str | None:
        """The text of a call; None if it failed and the run goes on without it."""
        self._work.add(num_calls=1)
        stops = self._cfg.judge_fallback == "stop"
        try:
            text = await self._call(body)
            self._work.add(num_no_text=int(not (text or "").strip()))
            return text
        except _TooLong:
            self._work.add(num_too_long=1)
        except _Refused as refusal:
            self._work.add(num_failed=1)
            if stops or refusal.status not in OF_THE_TEXT:
                hint = USE_FALLBACK if refusal.status in OF_THE_TEXT else "check the reward.judge_* settings"
                raise self._stopped(str(refusal), f"{hint}, then run the same command again") from refusal
        except _NoAnswer as failure:
            self._work.add(num_failed=1)
            if stops:
                raise self._failed(failure) from failure
        return None

    async def _call(self, body: bytes) -> str | None:
        return await self._tried(lambda: self._post(body))

    async def _tried(self, attempt: Any) -> Any:
        """Return the result of `attempt()`, retried as the class describes. Raises the error of the last attempt.

        A call keeps its slot while it pauses, so that a failing server does not get all other calls meanwhile.
        """
        called_at = self._loop.time()
        async with self._slots:
            started_at = self._loop.time()
            num_attempts = 1 if self._down_at > self._answered_at else 1 + self._cfg.judge_retries
            failure = _NoAnswer(self._last_failure)
            for number in range(1, num_attempts + 1):
                if self._down_at > max(called_at, self._answered_at):  # another call found the server down meanwhile
                    raise failure
                try:
                    async with asyncio.timeout(self._cfg.judge_timeout_s):
                        result = await attempt()
                    self._answered_at = self._loop.time()
                    return result
                except (_Refused, _TooLong):
                    self._answered_at = self._loop.time()
                    raise
                except (TimeoutError, httpx2.HTTPError, NotAReply, _NoAnswer) as error:
                    failure = self._as_no_answer(error)
                if number < num_attempts:
                    self._work.add(num_retries=1)
                    pause = pause_s(number, self._cfg.judge_backoff_s, self._random.random())
                    await asyncio.sleep(max(pause, failure.wait_s))
            if self._answered_at < started_at:
                self._down_at, self._last_failure = self._loop.time(), str(failure)
            raise failure

    def _as_no_answer(self, error: Exception) -> _NoAnswer:
        if isinstance(error, _NoAnswer):
            return error
        if isinstance(error, TimeoutError):
            return _NoAnswer(f"no complete reply within {self._cfg.judge_timeout_s:g} s (reward.judge_timeout_s)")
        if isinstance(error, NotAReply):
            return _NoAnswer(self._safe(str(error)))
        return _NoAnswer(self._safe(printable(f"{type(error).__name__} {error}".strip(), self._key)))

    async def _post(self, body: bytes) -> str | None:
        """The text of one request."""
        data = await self._request("POST", PATHS[self._cfg.judge_api], body)
        return read_text(data, self._cfg.judge_api, self._key)

    async def _models(self) -> list[str]:
        return read_models(await self._request("GET", "/models", None), self._key)

    async def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        """The body of a reply with status 2xx."""
        async with self._client.stream(method, self._url + path, content=body) as response:
            status = response.status_code
            data = b""
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > MAX_REPLY_BYTES:
                    raise _NoAnswer(f"a reply (HTTP {status}) of more than {MAX_REPLY_BYTES} bytes")
        if 200 <= status < 300:
            return data
        reason = self._safe(f"HTTP {status} {server_message(data, self._key)}" if data else f"HTTP {status}")
        if 300 <= status < 400:
            location = self._safe(printable(response.headers.get("location", ""), self._key))
            raise _Refused(f"HTTP {status}, a redirect to {location!r}; redirects are not followed", status)
        if status in TRIED_AGAIN or status >= 500 or status < 200:
            raise _NoAnswer(reason, retry_after_s(response.headers.get("retry-after")))
        if body is not None and says_too_long(status, data):
            raise _TooLong
        raise _Refused(reason, status)

    # ---- error messages ------------------------------------------------------------------------------------------------------

    def _safe(self, text: str) -> str:
        return safe(text, self._key)

    def _failed(self, failure: _NoAnswer) -> JudgeServiceError:
        return JudgeServiceError(
            f"the judge at {self._url} gave no answer in {1 + self._cfg.judge_retries} attempts; the last one: {failure}. "
            "Check that its server runs, then run the same command again (it resumes from the last checkpoint). To wait longer, "
            f"raise reward.judge_retries or reward.judge_timeout_s; {USE_FALLBACK}"
        )

    def _stopped(self, reason: str, hint: str) -> JudgeServiceError:
        return JudgeServiceError(f"the judge at {self._url} refused the call: {reason}; {hint}")

    def close(self) -> None:
        """Close the connections and end the service's thread."""
        self._end()
        self._thread.join(timeout=5)


def check_service(cfg: RewardConfig) -> None:
    """Raise UserError for an address or numbers that cannot work, and for a setting that the API of the server cannot follow."""
    checked_url(cfg.judge_url)
    check_ranges(cfg, prefix="reward.")
    chat, default = cfg.judge_chat, ChatConfig()
    if cfg.judge_api == "chat":
        if chat.template == "off":
            raise UserError(
                "reward.judge_chat.template is off and reward.judge_api chat: a server puts every chat into its chat template, "
                "set reward.judge_api to 'completions'"
            )
        if cfg.judge_path:
            raise UserError(
                "reward.judge_path is set and reward.judge_api chat: a chat becomes tokens on the server, set reward.judge_api "
                "to 'completions', or remove reward.judge_path"
            )
    elif not cfg.judge_path:
        given = {"template": chat.template == "on", "system": chat.system, "options": chat.options != default.options}
        if named := [name for name, is_set in given.items() if is_set]:
            raise UserError(
                f"reward.judge_chat.{named[0]} is set, but reward.judge_api completions sends prompts without a chat template: "
                "set reward.judge_path to the folder with the judge's tokenizer, or reward.judge_api to 'chat'"
            )


def _run(loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient) -> None:
    """The service's thread: until the loop is stopped, then everything is closed."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.run_until_complete(_give_up(client))
    loop.close()


async def _give_up(client: httpx2.AsyncClient) -> None:
    """End all calls that are still open, then close the connections."""
    calls = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await client.aclose()
