"""The judge R_phi of Eq. 5: its protocol, a simulated annotator, and a language model that writes verdicts (4.3.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema, same_answer
from srpo.data.examples import Example
from srpo.rewards.verdict_cache import ParsedVerdicts, VerdictCache, WorkCounts, question_key
from srpo.rewards.verdicts import judge_prompt, parse_verdicts
from srpo.rollout.engine import SamplingParams

# [J] whether each step is correct, or its probability (graded scalar model); None if the judge gives no verdict
Verdicts = tuple[bool | float | None, ...]


class Judge(Protocol):
    """R_phi of Eq. 5: judges whether each step of a response is correct."""

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Return verdicts [N][J]; rollouts[i] answers the pair examples[i]."""
        ...


class OracleJudge:
    """A simulated annotator that compares each answer with `example.truth` and errs at a given rate.

    Its errors are a pure function of (seed, example id, response text, step), so verdicts do not depend on the order or number of
    calls. A missing answer is always wrong; a step without truth gets no verdict. Raises ValueError for a rate outside 0..1.
    """

    def __init__(self, error_rate: float, seed: int, schema: StepSchema) -> None:
        if not 0 <= error_rate <= 1:
            raise ValueError(f"reward.judge_error_rate is {error_rate}: set it to a number from 0 to 1")
        self.error_rate = error_rate
        self.seed = seed
        self.num_steps = schema.num_steps

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Return verdicts [N][J]. Raises UserError if an example's truth or a rollout's answers are not one per step."""
        return [self._judge(rollout, example) for rollout, example in zip(rollouts, examples, strict=True)]

    def _judge(self, rollout: Rollout, example: Example) -> Verdicts:
        truth = example.truth or (None,) * self.num_steps
        if not len(truth) == len(rollout.answers) == self.num_steps:
            raise UserError(
                f"{example.example_id}: {len(truth)} truths and {len(rollout.answers)} answers for {self.num_steps} steps; "
                "use data and rollouts with the steps of the config"
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
        """Pseudo-random number, uniform in [0, 1)."""
        key = repr((self.seed, rollout.example_id, rollout.text, j)).encode("utf-8", "backslashreplace")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()[:6], "big") / 2**48


class Writer(Protocol):
    """A language model that continues texts, in this process or on a server. Several threads may call `write` at once."""

    @property
    def identity(self) -> str:
        """Name of the model; writers with equal names give equal greedy texts, so the verdict cache uses it in its keys."""
        ...

    @property
    def work(self) -> WorkCounts:
        """Counters num_calls (texts requested), num_retries, num_failed, num_too_long and num_no_text."""
        ...

    def write(self, prompts: Sequence[str], params: SamplingParams, seed: int) -> list[list[str | None]]:
        """Return `params.group_size` texts per prompt; None if the prompt is too long or its call failed (both are counted)."""
        ...

    def close(self) -> None: ...


class GenerativeJudge:
    """A language model that reads a pair and a response, and writes verdicts in the form of Figure 4.

    `writer` samples with `params` (greedy, group_size 1, the judge's stop ids). Any text is parsed. A question in `cache` is not
    sent again, nor are equal questions of one call. Several threads may call `judge` at once.

    The judged response is part of the prompt, so it may contain verdicts or a fake end of the prompt. Only the text that the
    model writes after the prompt is parsed, so a response can influence no verdicts but its own. A policy that learns to do so
    shows in the audit (`srpo.rewards.audit`) if steps have labels.
    """

    def __init__(
        self,
        writer: Writer,
        schema: StepSchema,
        params: SamplingParams,
        *,
        seed: int = 0,
        cache: VerdictCache | None = None,
        guidelines: str = "",
    ) -> None:
        if params.group_size != 1:
            raise ValueError(f"the judge samples {params.group_size} texts per response: set its group_size to 1")
        self.writer = writer
        self.schema = schema
        self.params = params
        self.seed = seed
        self.guidelines = guidelines  # text that every prompt begins with
        self.cache = VerdictCache(0) if cache is None else cache
        self._work = WorkCounts()

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Return verdicts [N][J], None if the text has no verdict on a step. Raises what the writer raises."""
        prompts = self._prompts(rollouts, examples)
        with self._work.busy():
            verdicts = self._verdicts(list(dict.fromkeys(prompts)))
        self._work.add(num_responses=len(prompts))
        return [verdicts[prompt] for prompt in prompts]

    def _verdicts(self, prompts: Sequence[str]) -> dict[str, ParsedVerdicts]:
        """Verdicts by prompt; the prompts differ. A prompt without text is not cached: the next call may succeed."""
        keys = {prompt: question_key(self.writer.identity, self.params, self.seed, prompt) for prompt in prompts}
        cached = {prompt: self.cache.get(key) for prompt, key in keys.items()}
        verdicts = {prompt: known for prompt, known in cached.items() if known is not None}
        new = [prompt for prompt in prompts if prompt not in verdicts]
        for prompt, (text,) in zip(new, self.writer.write(new, self.params, self.seed) if new else (), strict=True):
            verdicts[prompt] = parse_verdicts(text or "", self.schema.num_steps)
            if text is not None:
                self.cache.put(keys[prompt], verdicts[prompt])
        self._work.add(num_asked=len(new))
        return verdicts

    def votes(self, rollouts: Sequence[Rollout], examples: Sequence[Example], num_votes: int, seed: int) -> list[list[Verdicts]]:
        """Return `num_votes` sampled verdicts on each rollout, [N][num_votes][J]; their spread measures the judge's certainty."""
        params = replace(self.params, group_size=num_votes, greedy=False)
        texts = self.write(rollouts, examples, params, seed)
        return [[parse_verdicts(text, self.schema.num_steps) for text in several] for several in texts]

    def write(
        self, rollouts: Sequence[Rollout], examples: Sequence[Example], params: SamplingParams, seed: int
    ) -> list[list[str]]:
        """Return `params.group_size` texts about each rollout, "" for a missing one. Equal prompts are sent once."""
        prompts = self._prompts(rollouts, examples)
        unique = list(dict.fromkeys(prompts))
        texts = dict(zip(unique, self.writer.write(unique, params, seed), strict=True)) if unique else {}
        return [[text or "" for text in texts[prompt]] for prompt in prompts]

    def _prompts(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[str]:
        pairs = zip(rollouts, examples, strict=True)
        return [judge_prompt(example, rollout.text, self.guidelines) for rollout, example in pairs]

    def take_counts(self) -> dict[str, float]:
        """Return the work since the last `take_counts`, for `srpo.rewards.verdict_cache.work_metrics`.

        num_responses judged; num_asked, questions sent to the writer (not in the cache, equal ones counted once); busy_s; and the
        writer's counts.
        """
        return {**self.writer.work.take(), **self._work.take()}

    def close(self) -> None:
        """Free the writer's resources. The judge cannot be used afterwards."""
        self.writer.close()
