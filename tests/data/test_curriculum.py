"""Stages of a curriculum: their examples, their ends, the settings refused at the start, and resuming at any step."""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from srpo.core.config.train import Config, DataConfig, RolloutConfig, SamplerConfig, StageConfig, TrainConfig
from srpo.core.settings import apply_toml, dump_toml, load
from srpo.data.curriculum import Curriculum, Stage, all_examples, check_curriculum, load_stages
from srpo.data.examples import Example
from srpo.data.world import World

ROOT = Path(__file__).resolve().parents[2]


def example(i: int, **tags: str) -> Example:
    known = {"query_type": "pqr"[i % 3], "difficulty": ("easy", "medium", "hard")[i // 2 % 3], "solve_rate": f"{i % 11 / 10}"}
    return Example(f"e{i}", f"q{i}", "query", "title", gold=(None,) * 4 + (f"L{i % 4 + 1}",), tags={**known, **tags})


EXAMPLES = [example(i) for i in range(60)]
OTHERS = [example(i) for i in range(40, 100)]


def config(*stages: StageConfig, num_steps: int = 20, **changes: Any) -> Config:
    return Config(
        num_steps=num_steps,
        data=DataConfig(train="train", eval="eval"),
        rollout=RolloutConfig(num_prompts=4),
        curriculum=stages,
        **changes,
    )


def read(path: str) -> list[Example]:
    return {"train": EXAMPLES, "others": OTHERS}[path]


def curriculum(*stages: StageConfig, seed: int = 0, **changes: Any) -> Curriculum:
    cfg = config(*stages, **changes)
    check_curriculum(cfg)
    return Curriculum(load_stages(cfg, read), seed)


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


FIRST = StageConfig("first", num_steps=3)
LAST = StageConfig("last")


# ---- the examples of a stage ---------------------------------------------------------------------------------------------------


def test_without_a_curriculum_there_is_one_stage_of_everything() -> None:
    (stage,) = load_stages(config(), read)
    assert stage.examples == EXAMPLES and stage.settings == SamplerConfig() and stage.name == ""
    one = Curriculum([stage], 0)
    for _ in range(30):
        one.next(4)
        assert not one.end_step({"reward/total": 0.0})
    assert one.metrics()["sampler/stage"] == 1


def test_a_stage_holds_what_its_tags_and_solve_rates_say() -> None:
    stages = load_stages(
        config(
            StageConfig("easy", num_steps=2, tags={"difficulty": ("easy", "medium"), "query_type": ("p",)}),
            StageConfig("range", num_steps=2, solve_rate=(0.2, 0.5)),
            StageConfig("grades", num_steps=2, tags={"grade": ("L1", "L4")}),  # from gold: the examples have no such tag
            StageConfig("own", data="others", balance="query_type", difficulty_low=0.3, difficulty_high=0.6),
            sampler=SamplerConfig(balance="grade", max_age=7),
        ),
        read,
    )
    wanted = [
        lambda i: i // 2 % 3 < 2 and i % 3 == 0,
        lambda i: 2 <= i % 11 <= 5,
        lambda i: i % 4 in (0, 3),
    ]
    for stage, want in zip(stages[:3], wanted, strict=True):
        assert stage.examples == [e for i, e in enumerate(EXAMPLES) if want(i)]
        assert stage.settings == SamplerConfig(balance=("grade",), max_age=7)
    assert stages[3].examples == OTHERS
    assert stages[3].settings == SamplerConfig(balance=("query_type",), max_age=7, difficulty_low=0.3, difficulty_high=0.6)
    ids = [e.example_id for e in all_examples(stages)]
    assert sorted(ids) == sorted({e.example_id for stage in stages for e in stage.examples})


def test_an_empty_balance_of_a_stage_is_none_and_an_unset_one_is_the_sampler_s() -> None:
    stages = load_stages(
        config(StageConfig("a", num_steps=1, balance=()), StageConfig("b"), sampler=SamplerConfig(balance=("grade",))), read
    )
    assert [stage.settings.balance for stage in stages] == [(), ("grade",)]


def test_each_stage_is_even_over_its_own_tags() -> None:
    both = curriculum(StageConfig("types", num_steps=3, balance="query_type"), StageConfig("labels", balance="grade"))
    for step in range(6):
        batch = both.next(12)
        if step < 3:
            assert Counter(e.tags["query_type"] for e in batch) == {"p": 4, "q": 4, "r": 4}
        else:
            assert Counter(e.grade for e in batch) == {"L1": 3, "L2": 3, "L3": 3, "L4": 3}
        assert both.metrics()["sampler/stage"] == 1 + (step >= 3)
        assert both.end_step({}) == (step == 2)


def test_estimates_carry_over_by_example_id() -> None:
    two = curriculum(FIRST, StageConfig("own", data="others"), num_steps=9)
    for _ in range(3):
        two.next(4)
        two.end_step({})
    two.observe([f"e{i}" for i in range(0, 60)], [1.0] * 60)  # 20 of them belong to OTHERS, too
    metrics = two.metrics()
    assert (metrics["sampler/coverage_frac"], metrics["sampler/num_skipped"]) == (pytest.approx(20 / 60), 20)
    seen = {e.example_id for e in two.next(40)}
    assert seen == {f"e{i}" for i in range(60, 100)}


# ---- the end of a stage --------------------------------------------------------------------------------------------------------


def stages_of(values: list[float | None], ends: StageConfig) -> list[int]:
    """The stage of each step, and of the step after the last, if the metric has these values."""
    one = curriculum(ends, LAST, num_steps=100)
    stages = []
    for value in values:
        stages.append(int(one.metrics()["sampler/stage"]))
        one.end_step({} if value is None else {ends.metric or "reward/total": value})
    return [*stages, int(one.metrics()["sampler/stage"])]


def test_plateaus_by_hand() -> None:
    ends = StageConfig("plateau", metric="reward/total", min_gain=0.1, patience=2)
    assert stages_of([1.0, 1.2, 1.4, 1.6], ends) == [1] * 5
    assert stages_of([1.0, 1.05, 1.09, 5.0], ends) == [1, 1, 1, 2, 2]  # two values in a row without a rise
    assert stages_of([1.0, 1.05, 1.125, 1.0, 1.25, 1.0, 1.0], ends) == [1] * 7 + [2]  # small gains add up
    assert stages_of([1.0, None, None, None, 0.5, None, 0.5], ends) == [1] * 7 + [2]  # steps without a value do not count
    assert stages_of([math.nan, math.nan], ends) == [1, 1, 2]
    assert stages_of([-2.0, -1.5, -1.0, math.inf, -1.0], ends) == [1] * 5 + [2]
    equal = StageConfig("plateau", metric="reward/total", patience=3)  # no least gain: equal is no rise
    assert stages_of([1.0, 1.0, 1.0, 1.0], equal) == [1, 1, 1, 1, 2]


def test_whichever_end_comes_first() -> None:
    both = StageConfig("both", num_steps=4, metric="reward/total", patience=2)
    assert stages_of([1.0, 2.0, 3.0, 4.0, 5.0], both) == [1, 1, 1, 1, 2, 2]
    assert stages_of([1.0, 1.0, 1.0, 4.0, 5.0], both) == [1, 1, 1, 2, 2, 2]


def test_the_next_stage_has_a_plateau_of_its_own() -> None:
    plateau = {"metric": "reward/total", "patience": 2}
    one = curriculum(StageConfig("a", **plateau), StageConfig("b", **plateau), LAST, num_steps=50)
    switches = [one.end_step({"reward/total": value}) for value in (9.0, 8.0, 8.0, 1.0, 2.0, 3.0, 3.0, 3.0, 9.0, 9.0)]
    assert [i for i, switched in enumerate(switches) if switched] == [2, 7]


def test_the_earliest_end_that_the_checks_know_is_the_real_one() -> None:
    """A run one step longer than the earliest end is accepted: the last stage has that step. A run without it is refused."""
    for _ in range(30):
        rng = random.Random(seed := random.randrange(10**6))
        every = rng.randint(1, 6)
        plateau = StageConfig("b", metric=rng.choice(["eval/accuracy", "reward/total"]), patience=rng.randint(1, 4))
        stages = (StageConfig("a", num_steps=rng.randint(1, 9)), plateau, LAST)
        one, step = curriculum(*stages, num_steps=1000, train=TrainConfig(eval_every=every)), 0
        while one.stage.name != "last":
            step += 1
            one.end_step({"reward/total": 1.0} | ({"eval/accuracy": 1.0} if step % every == 0 else {}))
        check_curriculum(config(*stages, num_steps=step + 1, train=TrainConfig(eval_every=every)))
        with pytest.raises(ValueError, match=f"step {step} at the earliest"):
            check_curriculum(config(*stages, num_steps=step, train=TrainConfig(eval_every=every)))
        print(seed)


# ---- resuming at any step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [through_json, through_torch])
def test_resumed_anywhere_it_goes_on_the_same(through: Any) -> None:
    """Within a stage, within a plateau, at a switch, in the last stage: a run of 40 steps is resumed after each step."""
    seed = random.randrange(10**6)
    stages = (
        StageConfig("a", metric="eval/macro_f1", min_gain=0.05, patience=2, balance="query_type"),
        StageConfig("b", num_steps=7, metric="reward/total", patience=3, data="others"),
        StageConfig("c", num_steps=6, tags={"difficulty": ("easy", "medium")}, difficulty_high=0.7),
        StageConfig("d", balance=("grade", "difficulty")),
    )
    train = TrainConfig(eval_every=3)

    def make() -> Curriculum:
        return curriculum(*stages, num_steps=40, train=train, seed=seed, sampler=SamplerConfig(max_age=6))

    def play(one: Curriculum, start: int, end: int) -> list[Any]:
        played = []
        for step in range(start, end):
            rng = random.Random(f"{seed} {step}")
            batch = [e.example_id for e in one.next(4) + one.more(rng.randint(0, 2))]
            one.observe(batch, [rng.choice([0.0, 0.3, 0.5, 0.8, 1.0]) for _ in batch])
            metrics = one.metrics() | {"reward/total": rng.random()}
            metrics |= {"eval/macro_f1": rng.random() / (1 + step)} if (step + 1) % 3 == 0 else {}  # a plateau comes in time
            played.append((batch, metrics, one.end_step(metrics)))
        return played

    uninterrupted = make()
    states, expected = [], []
    for step in range(40):
        states.append(through(uninterrupted.state_dict()))
        expected += play(uninterrupted, step, step + 1)
    assert {metrics["sampler/stage"] for _, metrics, _ in expected} == {1, 2, 3, 4}, seed
    for step, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        assert play(resumed, step, 40) == expected[step:], (seed, step)
        assert resumed.state_dict() == uninterrupted.state_dict()


def test_the_state_of_other_data_is_refused() -> None:
    def one(examples: list[Example], seed: int = 0) -> Curriculum:
        return Curriculum([Stage("", examples, SamplerConfig(), StageConfig(""))], seed)

    for other in (one(EXAMPLES[:-1]), one(EXAMPLES[::-1]), one(OTHERS), one(EXAMPLES, seed=1)):
        with pytest.raises(ValueError, match="other training data"):
            one(EXAMPLES).load_state_dict(other.state_dict())


# ---- settings and data that are refused ----------------------------------------------------------------------------------------


EVAL = TrainConfig(eval_every=5)
FOURTH = StageConfig("fourth", num_steps=4)  # with FIRST: step 7
PLATEAU = {"metric": "reward/total", "patience": 3}


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ([FIRST, FIRST, LAST], {}, r"name 'first' is empty or used twice: give every stage a name"),
        ([StageConfig("", num_steps=3), LAST], {}, r"name '' is empty or used twice"),
        ([LAST, StageConfig("more")], {}, r"'last' has no end but is not the last: set its num_steps, or metric"),
        ([StageConfig("a", num_steps=12), StageConfig("b", num_steps=8), LAST], {}, r"step 20 .*\('a' 12, 'b' 20\).* above 20"),
        ([StageConfig("a", num_steps=12), StageConfig("b", num_steps=7), LAST], {}, ""),
        ([StageConfig("a", num_steps=12), StageConfig("b", num_steps=8)], {}, ""),
        ([StageConfig("a", num_steps=12), StageConfig("b", num_steps=9)], {}, r"'b' lasts until the end of the run, 20 st"),
        ([StageConfig("a", num_steps=12), StageConfig("b", num_steps=7)], {}, r"its num_steps is 7: remove it, or make"),
        ([StageConfig("a", **PLATEAU), StageConfig("b", num_steps=7)], {}, r"its num_steps is 7: remove it"),
        ([StageConfig("a", **PLATEAU), LAST], {}, ""),
        ([StageConfig("a", **PLATEAU), LAST], {"num_steps": 4}, r"'last' can never begin: .* step 4 at the"),
        ([StageConfig("a", **PLATEAU), StageConfig("b", **PLATEAU), LAST], {"num_steps": 8}, r"\('a' 4, 'b' 8\)"),
        ([StageConfig("a", **PLATEAU), StageConfig("b", **PLATEAU)], {}, r"'b' is the last and lasts until the end"),
        ([StageConfig("a", metric="eval/macro_f1", patience=3), LAST], {"train": EVAL}, r"end at optimizer step 20 at the"),
        ([StageConfig("a", metric="eval/macro_f1", patience=2), LAST], {"train": EVAL}, ""),
        ([FIRST, StageConfig("a", metric="eval/macro_f1", patience=2), LAST], {"train": EVAL}, ""),
        ([FIRST, FOURTH, StageConfig("a", metric="eval/macro_f1", patience=2), LAST], {"train": EVAL}, r"'a' 20"),
        ([StageConfig("a", num_steps=20)], {}, ""),
        ([LAST], {"num_steps": 0}, ""),
        ([StageConfig("a", metric="eval/macro_f1", patience=3), LAST], {}, r"waits for eval/macro_f1: set data.eval and"),
        ([StageConfig("a", metric="reward/totl", patience=3), LAST], {}, r"no metric 'reward/totl' .* is 'reward/total'"),
        ([StageConfig("a", metric="reward/step/verdit", patience=3), LAST], {}, r"nearest is 'reward/step/verdict'"),
        ([StageConfig("a", metric="reward/step/verdict", patience=3), LAST], {}, ""),
        ([StageConfig("a", metric="time/step_s", patience=3), LAST], {}, r"logs no metric 'time/step_s'"),
        ([StageConfig("a", metric="train/token_accuracy", patience=3), LAST], {}, r"logs no metric 'train/token_accuracy'"),
        ([StageConfig("a", num_steps=3, metric="reward/total"), LAST], {}, r"metric is set and patience is not"),
        ([StageConfig("a", num_steps=3, patience=3), LAST], {}, r"patience is set and metric is not"),
        ([StageConfig("a", num_steps=3, difficulty_low=0.95), LAST], {}, r"window \(0.95, 0.9\) filters out"),
        ([StageConfig("a", num_steps=3, solve_rate=(0.5, 0.2)), LAST], {}, r"no solve_rate lies in \[0.5, 0.2\]"),
        ([StageConfig("a", num_steps=3, tags={"difficulty": ()}), LAST], {}, r"tags.difficulty names no value"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_run(stages: list[StageConfig], changes: dict[str, Any], message: str) -> None:
    cfg = config(*stages, **changes)
    if not message:
        return check_curriculum(cfg)
    with pytest.raises(ValueError, match=message):
        check_curriculum(cfg)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            StageConfig("a", tags={"season": ("summer",)}),
            r"'a': no example of train has the tag 'season': use one of difficulty, gr",
        ),
        (StageConfig("a", tags={"difficulty": ("eazy",)}), r"has difficulty = 'eazy': use some of easy, hard, medium"),
        (StageConfig("a", solve_rate=(0.91, 0.99)), r"'a' has 0 of the 60 examples of train, fewer than rollout.num_prompts = 4"),
        (StageConfig("a", tags={"query_type": ("p",)}, solve_rate=(0.0, 0.0)), r"'a' has 2 of the 60"),
        (StageConfig("a", balance=("grade", "season")), r"stage 'a': sampler.balance: example e0 has no tag 'season'"),
    ],
)
def test_data_that_do_not_make_a_stage(stage: StageConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(load_stages(config(stage), read), 0)


@pytest.mark.parametrize("text", ["", "much", "1.5", "nan"])
def test_a_solve_rate_that_is_none(text: str) -> None:
    strange = [*EXAMPLES[:5], example(5, solve_rate=text)]
    with pytest.raises(ValueError, match=rf"tag solve_rate of example e5 is '{text}', not a number from 0 to 1"):
        load_stages(config(StageConfig("a", solve_rate=(0.0, 0.5))), lambda path: strange)


def test_one_id_for_two_pairs() -> None:
    data = {"train": EXAMPLES, "others": [*OTHERS[:-1], example(3, domain="another")]}
    stages = load_stages(config(FIRST, StageConfig("b", data="others")), data.__getitem__)
    with pytest.raises(ValueError, match=r"stage 'b': example_id 'e3' is another pair in an earlier stage"):
        all_examples(stages)


# ---- in TOML -------------------------------------------------------------------------------------------------------------------


def test_a_stage_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "stages.toml"
    path.write_text(
        """
        [sampler]
        balance = "query_type"

        [[curriculum]]
        name = "a"
        data = "a.jsonl"
        tags = { difficulty = ["easy", "medium"] }
        solve_rate = [0, 0.5]
        balance = ["grade", "domain"]
        metric = "eval/macro_f1"
        patience = 3

        [[curriculum]]
        name = "b"
        balance = []
        difficulty_high = 0.8
        """,
        encoding="utf-8",
    )
    cfg = load(Config, ["@", str(path)])
    assert cfg.sampler.balance == ("query_type",)
    first = StageConfig(
        "a", "a.jsonl", {"difficulty": ("easy", "medium")}, (0.0, 0.5), ("grade", "domain"), metric="eval/macro_f1", patience=3
    )
    assert cfg.curriculum == (first, StageConfig("b", balance=(), difficulty_high=0.8))
    path.write_text(dump_toml(cfg), encoding="utf-8")
    assert apply_toml(Config(), path) == cfg
    assert load(Config, ["--sampler.balance", "grade", "domain"]).sampler.balance == ("grade", "domain")


@pytest.mark.parametrize("name", ["curriculum_easy_hard", "curriculum_query_label"])
def test_the_curricula_of_the_paper_in_front_of_the_laptop_s_settings(name: str) -> None:
    """On pairs of the catalogue world every stage has data and is balanced over its tags."""
    cfg = load(Config, ["@", str(ROOT / f"configs/{name}.toml"), "@", str(ROOT / "configs/tiny_cpu.toml")])
    assert len(cfg.curriculum) == 2 and cfg.num_steps == 40
    check_curriculum(cfg)
    stages = load_stages(cfg, lambda path: list(World(0).examples("train", 200)))
    for stage in stages:
        one = Curriculum([stage], 0)
        tag = stage.settings.balance[0]
        values = {e.tags[tag] for e in stage.examples}
        assert set(Counter(e.tags[tag] for e in one.next(len(values))).values()) == {1}
