"""The judge R_phi of Eq. 5: what it promises, a simulated annotator, and a language model that writes verdicts (4.3.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from srpo.batch import Rollout
from srpo.data.examples import Example
from srpo.rewards.verdicts import PROMPT, judge_prompt, parse_verdicts
from srpo.steps import StepSchema, same_answer

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


class Generator(Protocol):
    """The part of a rollout engine that the judge uses (`srpo.rollout.engine.Engine` is one)."""

    def generate(self, prompts: Sequence[tuple[int, ...]], params: Any, seed: int) -> Sequence[Any]: ...


class GenerativeJudge:
    """A language model that reads the pair and the response, and writes verdicts in the form of Figure 4.

    `engine` generates with `params` (a `SamplingParams`: greedy, group size 1, the judge's stop ids). Whatever it writes is read;
    a step that the schema wants judged and that gets no readable verdict counts as missing. A prompt of more than
    `max_prompt_tokens` (0: no bound) is not asked about and gets no verdicts. Equal prompts are asked about once.
    """

    def __init__(
        self,
        engine: Generator,
        tokenizer: Any,
        schema: StepSchema,
        params: Any,
        *,
        template: str = PROMPT,
        max_prompt_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        if params.group_size != 1:
            raise ValueError(f"the judge samples {params.group_size} texts per response: set its group_size to 1")
        self.engine = engine
        self.tokenizer = tokenizer
        self.schema = schema
        self.params = params
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.num_verdicts = 0  # that were asked for so far
        self.num_missing = 0  # of them, unreadable
        self.last_texts: tuple[str, ...] = ()  # what it wrote in the last call, one text per rollout

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        """Verdicts [N][J], None where the text gives none. Raises what the engine raises."""
        self.last_texts = tuple(texts[0] for texts in self.write(rollouts, examples, self.params, self.seed))
        verdicts: list[Verdicts] = [parse_verdicts(text, self.schema.num_steps) for text in self.last_texts]
        judged = [j for j, spec in enumerate(self.schema.specs) if "judge" in spec.sources]
        self.num_verdicts += len(judged) * len(verdicts)
        self.num_missing += sum(told[j] is None for told in verdicts for j in judged)
        return verdicts

    def votes(self, rollouts: Sequence[Rollout], examples: Sequence[Example], num_votes: int, seed: int) -> list[list[Verdicts]]:
        """`num_votes` sampled opinions on each rollout, [N][num_votes][J]: how sure the judge is. Not counted in `stats`."""
        params = replace(self.params, group_size=num_votes, greedy=False)
        texts = self.write(rollouts, examples, params, seed)
        return [[parse_verdicts(text, self.schema.num_steps) for text in several] for several in texts]

    def write(self, rollouts: Sequence[Rollout], examples: Sequence[Example], params: Any, seed: int) -> list[list[str]]:
        """`params.group_size` texts about each rollout; empty ones where its prompt is too long."""
        prompts = [self._prompt(rollout, example) for rollout, example in zip(rollouts, examples, strict=True)]
        asked = [p for p in dict.fromkeys(prompts) if not self.max_prompt_tokens or len(p) <= self.max_prompt_tokens]
        texts = {prompt: list[str]() for prompt in asked}
        for sample in self.engine.generate(asked, params, seed) if asked else ():
            text = self.tokenizer.decode(list(sample.response_ids), skip_special_tokens=True)
            texts[asked[sample.prompt_index]].append(text)
        return [texts.get(prompt) or [""] * params.group_size for prompt in prompts]

    def _prompt(self, rollout: Rollout, example: Example) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(judge_prompt(example, rollout.text, self.template), add_special_tokens=False))

    def stats(self) -> dict[str, float]:
        """num_verdicts asked for and num_missing of them, since the start."""
        return {"num_verdicts": self.num_verdicts, "num_missing": self.num_missing}
