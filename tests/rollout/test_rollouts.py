from __future__ import annotations

from srpo.core.steps import StepSchema, StepSpec
from srpo.data.examples import Example
from srpo.rollout.engine import Sample
from srpo.rollout.rollouts import to_rollouts

SCHEMA = StepSchema((StepSpec("thought", r"^A:", "", ()), StepSpec("verdict", r"^B:", r"(\w+)", ("yes", "no"))))


class Characters:
    """One token per character."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_each_sample_goes_to_the_example_of_its_prompt():
    examples = [Example(name, "q", "query", "title") for name in ("x", "y")]
    prompts = [ids("p"), ids("pp")]
    texts = ["A: hm\nB: yes", "B: no", "nothing", "A: so"]
    samples = [Sample(i // 2, ids(t), (-0.5,) * len(t), "stop" if i else "length") for i, t in enumerate(texts)]
    rollouts = to_rollouts(examples, samples, prompts, SCHEMA, Characters(), version=3, first_group=10)
    assert [(r.example_id, r.group, r.prompt_ids) for r in rollouts] == [("x", 10, prompts[0])] * 2 + [("y", 11, prompts[1])] * 2
    assert [r.text for r in rollouts] == texts
    assert [r.answers for r in rollouts] == [("hm", "yes"), (None, "no"), (None, None), ("so", None)]
    assert [r.finish for r in rollouts] == ["length", "stop", "stop", "stop"]
    for rollout, sample in zip(rollouts, samples, strict=True):
        assert rollout.response_ids == sample.response_ids
        assert rollout.sampling_logprobs == sample.sampling_logprobs
        assert rollout.step_ends[-1] == len(sample.response_ids)
        assert rollout.policy_version == 3
        assert rollout.step_rewards is None
    assert rollouts[0].step_ends[0] == len("A: hm\n")


def test_the_stop_token_is_no_text_of_the_answer():
    class Stopping(Characters):
        eos_token_id = ord("|")

    text = "A: hm\nB: yes|"
    (rollout,) = to_rollouts(
        [Example("x", "q", "query", "title")],
        [Sample(0, ids(text), (0.0,) * len(text), "stop")],
        [ids("p")],
        SCHEMA,
        Stopping(),
        version=0,
    )
    assert rollout.text == text[:-1] and rollout.response_ids == ids(text) and rollout.step_ends[-1] == len(text)
