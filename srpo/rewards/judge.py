"""The judge R_phi of Eq. 5: what it promises, a simulated annotator, and a language model that writes verdicts (4.3.1)."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from srpo.core.batch import Rollout
from srpo.core.steps import StepSchema, same_answer
from srpo.data.examples import Example
from srpo.rewards.verdict_cache import Told, VerdictCache, WorkCounts, question_key
from srpo.rewards.verdicts import PROMPT, judge_prompt, parse_verdicts

# [J] whether each step is right, or with what probability (a graded scalar model); None where the judge does not say
Verdicts = tuple[bool | float | None, ...]


class Judge(Protocol):
    """Says of each step of a response whether it is right."""

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Verdicts of each rollout, [N][J]; examples[i] is the pair that rollouts[i] answers."""
        ...


class OracleJudge:
    """A simulated annotator: holds each answer against `example.truth` and errs at a given rate.

    An error is a pure function of (seed, example, response text, step), so verdicts depend neither on the order nor on the
    number of calls. A missing answer is always wrong; without a truth there is no verdict. ValueError for a rate outside 0..1.
    """

    def __init__(self, error_rate: float, seed: int, schema: StepSchema) -> None:
        if not 0 <= error_rate <= 1:
            raise ValueError(f"reward.judge_error_rate is {error_rate}: set it between 0 and 1")
        self.error_rate = error_rate
        self.seed = seed
        self.num_steps = schema.num_steps

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Verdicts [N][J]. ValueError where an example's truth has not one entry per step."""
        return [self._judge(rollout, example) for rollout, example in zip(rollouts, examples, strict=True)]

    def _judge(self, rollout: Rollout, example: Example) -> Verdicts:
        truth = example.truth or (None,) * self.num_steps
        if not len(truth) == len(rollout.answers) == self.num_steps:
            raise ValueError(
                f"{example.example_id}: {len(truth)} truths and {len(rollout.answers)} answers for {self.num_steps} steps; "
                "use data and rollouts made for these steps"
            )
        pairs = zip(rollout.answers, truth, strict=True)
        return tuple(self._verdict(rollout, j, answer, true) for j, (answer, true) in enumerate(pairs))

    def _verdict(self, rollout: Rollout, j: int, answer: str | None, truth: str | None) -> bool | None:
        if truth is None:
            return None
        if answer is None:
            return False
        return same_answer(answer, truth) != (self._draw(rollout, j) < self.error_rate)

    def _draw(self, rollout: Rollout, j: int) -> float:
        """Uniform in [0, 1)."""
        key = repr((self.seed, rollout.example_id, rollout.text, j)).encode("utf-8", "backslashreplace")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()[:6], "big") / 2**48


class Writer(Protocol):
    """A language model that continues texts, wherever it runs; `write` is called by several threads at once."""

    @property
    def identity(self) -> str:
        """Names the model: what two judges of the same name say is the same."""
        ...

    @property
    def work(self) -> WorkCounts:
        """num_calls (texts asked for), num_retries, num_failed, num_too_long."""
        ...

    def write(self, prompts: Sequence[str], params: Any, seed: int) -> list[list[str | None]]:
        """`params.group_size` texts after each prompt; None where there is none: too long, or failed and counted."""
        ...

    def close(self) -> None: ...


class GenerativeJudge:
    """A language model that reads the pair and the response, and writes verdicts in the form of Figure 4.

    `writer` writes with `params` (a `SamplingParams`: greedy, group size 1, the judge's stop ids). Whatever it writes is read; a
    step that the schema wants judged and that gets no readable verdict counts as missing. A question that `cache` knows, and the
    second of two equal ones in a call, is not asked. `judge` may be called by several threads, a few responses at a time.

    The judged text is part of the prompt. It can contain verdicts, or what looks like the end of the prompt; only what the model
    writes after it is read, so at most it changes the verdicts on itself. That it may do, by any means that works on a language
    model: a policy that learns to shows in the audit (`srpo.rewards.audit`), where steps have labels.
    """

    def __init__(
        self,
        writer: Writer,
        schema: StepSchema,
        params: Any,
        *,
        template: str = PROMPT,
        seed: int = 0,
        cache: VerdictCache | None = None,
    ) -> None:
        if params.group_size != 1:
            raise ValueError(f"the judge samples {params.group_size} texts per response: set its group_size to 1")
        self.writer = writer
        self.schema = schema
        self.params = params
        self.template = template
        self.seed = seed
        self.cache = VerdictCache(0) if cache is None else cache
        self._work = WorkCounts()
        self._lock = threading.Lock()
        self.num_verdicts = 0  # that were asked for so far
        self.num_missing = 0  # of them, unreadable

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Verdicts [N][J], None where the text gives none. Raises what the writer raises."""
        prompts = self._prompts(rollouts, examples)
        with self._work.busy():
            told = self._told(list(dict.fromkeys(prompts)))
        verdicts: list[Verdicts] = [told[prompt] for prompt in prompts]
        judged = [j for j, spec in enumerate(self.schema.specs) if "judge" in spec.sources]
        self._work.add(num_responses=len(prompts))
        with self._lock:
            self.num_verdicts += len(judged) * len(verdicts)
            self.num_missing += sum(said[j] is None for said in verdicts for j in judged)
        return verdicts

    def _told(self, prompts: Sequence[str]) -> dict[str, Told]:
        """The verdicts on different prompts. What has no text is not remembered: it may get one the next time."""
        keys = {prompt: question_key(self.writer.identity, self.params, self.seed, prompt) for prompt in prompts}
        known = {prompt: self.cache.get(key) for prompt, key in keys.items()}
        told = {prompt: verdicts for prompt, verdicts in known.items() if verdicts is not None}
        asked = [prompt for prompt in prompts if prompt not in told]
        for prompt, (text,) in zip(asked, self.writer.write(asked, self.params, self.seed) if asked else (), strict=True):
            told[prompt] = parse_verdicts(text or "", self.schema.num_steps)
            if text is not None:
                self.cache.put(keys[prompt], told[prompt])
        self._work.add(num_asked=len(asked))
        return told

    def votes(self, rollouts: Sequence[Rollout], examples: Sequence[Example], num_votes: int, seed: int) -> list[list[Verdicts]]:
        """`num_votes` sampled opinions on each rollout, [N][num_votes][J]: how sure the judge is. Not counted in `stats`."""
        params = replace(self.params, group_size=num_votes, greedy=False)
        texts = self.write(rollouts, examples, params, seed)
        return [[parse_verdicts(text, self.schema.num_steps) for text in several] for several in texts]

    def write(self, rollouts: Sequence[Rollout], examples: Sequence[Example], params: Any, seed: int) -> list[list[str]]:
        """`params.group_size` texts about each rollout; empty ones where there are none. Equal prompts are asked about once."""
        prompts = self._prompts(rollouts, examples)
        asked = list(dict.fromkeys(prompts))
        texts = dict(zip(asked, self.writer.write(asked, params, seed), strict=True)) if asked else {}
        return [[text or "" for text in texts[prompt]] for prompt in prompts]

    def _prompts(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[str]:
        return [judge_prompt(example, rollout.text, self.template) for rollout, example in zip(rollouts, examples, strict=True)]

    def stats(self) -> dict[str, float]:
        """num_verdicts asked for and num_missing of them, since the start."""
        return {"num_verdicts": self.num_verdicts, "num_missing": self.num_missing}

    def take_counts(self) -> dict[str, float]:
        """The work since the last call of this, for `srpo.rewards.verdict_cache.work_metrics`: num_responses judged, num_asked of
        them that neither the cache nor an equal one answered, busy_s, and what the writer counts."""
        return {**self.writer.work.take(), **self._work.take()}

    def close(self) -> None:
        """Free what the writer holds; the judge is not used again."""
        self.writer.close()
