"""The judge on a rollout engine: encodes prompts, samples, decodes texts. Threads that call at once share a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from srpo.core.errors import UserError
from srpo.core.steps import without_stops
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.encoding import Part
from srpo.data.tokenizer import encode_prompt
from srpo.rewards.verdict_cache import WorkCounts
from srpo.rollout.engine import Engine, SamplingParams

Texts = list[list[str | None]]  # [N][group_size]


@dataclass(eq=False)
class _Request:
    """A call of `write` that waits for its texts."""

    prompts: Sequence[str]
    params: SamplingParams
    seed: int
    texts: Texts | None = None
    error: UserError | None = None
    taken: bool = False


class EngineWriter:
    """A `srpo.rewards.judge.Writer` on a rollout engine.

    The engine serves one call at a time; greedy requests that arrive meanwhile form its next batch. A prompt of more than
    `max_prompt_tokens` (0: no bound) gets no text. `close` frees the engine. An engine's UserError is raised with the judge's
    name in front.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        identity: str = "local",
        max_prompt_tokens: int = 0,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self._identity = identity
        self._close = close
        self._work = WorkCounts()
        self._waiting: list[_Request] = []
        self._waiting_lock, self._engine_lock = threading.Lock(), threading.Lock()

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def work(self) -> WorkCounts:
        return self._work

    def write(self, prompts: Sequence[str], params: SamplingParams, seed: int) -> Texts:
        """Return `params.group_size` texts per prompt. Sampled texts depend on the order of the prompts, greedy ones do not."""
        request = _Request(prompts, params, seed)
        with self._waiting_lock:
            self._waiting.append(request)
        with self._engine_lock:
            if not request.taken:
                self._serve(self._batch(request))
        if request.error is not None:
            raise type(request.error)(str(request.error)) from request.error
        assert request.texts is not None
        return request.texts

    def _batch(self, first: _Request) -> list[_Request]:
        """Requests for one call of the engine: all waiting greedy ones with the same params, or a single sampled one."""
        with self._waiting_lock:
            batch = [r for r in self._waiting if r is first or (first.params.greedy and r.params == first.params)]
            self._waiting = [r for r in self._waiting if r not in batch]
        for request in batch:
            request.taken = True
        return batch

    def _serve(self, batch: Sequence[_Request]) -> None:
        try:
            texts = self._write(
                list(dict.fromkeys(p for request in batch for p in request.prompts)), batch[0].params, batch[0].seed
            )
        except UserError as error:
            for request in batch:
                request.error = type(error)(f"the judge ({self._identity}): {error}")  # an engine's keeps the lines of its log
                request.error.__cause__ = error
            return
        except BaseException:
            for request in batch:
                request.error = UserError(f"the judge ({self._identity}) was interrupted")
            raise
        for request in batch:
            request.texts = [texts[prompt] for prompt in request.prompts]

    def _write(self, prompts: Sequence[str], params: SamplingParams, seed: int) -> dict[str, list[str | None]]:
        ids = {prompt: encode_prompt(self.tokenizer, [Part(prompt)]) for prompt in prompts}
        fitting = [p for p in prompts if not self.max_prompt_tokens or len(ids[p]) <= self.max_prompt_tokens]
        texts: dict[str, list[str | None]] = {prompt: [] for prompt in prompts}
        stops = stop_ids(self.tokenizer)
        for sample in self.engine.generate([ids[p] for p in fitting], params, seed) if fitting else ():
            own = without_stops(self.tokenizer, sample.response_ids, stops)
            text = self.tokenizer.decode(list(own), skip_special_tokens=True)
            texts[fitting[sample.prompt_index]].append(text)
            self._work.add(num_no_text=int(not text.strip()))
        self._work.add(num_calls=len(fitting), num_too_long=len(prompts) - len(fitting))
        return {prompt: samples or [None] * params.group_size for prompt, samples in texts.items()}

    def close(self) -> None:
        if self._close is not None:
            self._close()
