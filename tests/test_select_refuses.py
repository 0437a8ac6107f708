"""Bad settings and data of `srpo.select`: the error says what to change, and nothing is sampled, written or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from select_cases import ONE, SCHEMA, Killed, Ranks, Scripted, config, contents, parts_with, results

from srpo.core.config.chat import ChatConfig
from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.config.train import DataConfig, LossConfig, RewardConfig, RolloutConfig
from srpo.core.errors import UserError
from srpo.rewards.judge import OracleJudge
from srpo.select import out_dir, records_dir, run
from srpo.selection.shards import finished_shards
from srpo.training.inputs import model_inputs


class Mute(OracleJudge):
    """Never gives a verdict."""

    def judge(self, rollouts: Any, examples: Any) -> Any:
        return [(None,) * 5 for _ in rollouts]


@pytest.mark.parametrize("audit", ["stop", "warn", "off"])
def test_a_judge_that_never_says_anything_is_told_or_stops_it(
    audit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path)
    cfg = replace(cfg, reward=replace(cfg.reward, audit=audit))
    parts = replace(parts_with(Scripted())(), judge=Mute(0.0, 0, SCHEMA))
    if audit == "stop":
        with pytest.raises(UserError, match="the judge gives no verdict on 100% of the steps left to it"):
            run(cfg, ONE, lambda *_: parts)
        assert not finished_shards(records_dir(cfg))
    else:
        run(cfg, ONE, lambda *_: parts)
        assert capsys.readouterr().out.count("gives no verdict on 100%") == (audit == "warn")


def test_finished_records_of_another_policy_are_not_chosen_from(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    cfg = config(tmp_path)
    cfg = replace(cfg, policy=replace(cfg.policy, path=str(policy)))
    parts = replace(parts_with(Scripted())(), inputs=model_inputs({"the starting policy": str(policy)}))
    run(cfg, ONE, lambda *_: parts)
    (policy / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=f"the starting policy at {policy} is not the one that"):
        run(cfg, ONE, lambda *_: parts)
    (policy / "config.json").unlink()  # choosing needs no policy
    run(cfg, ONE, lambda *_: parts)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> SelectConfig:
    """Settings of a finished run."""
    cfg = config(tmp_path_factory.mktemp("whole"))
    assert run(cfg, ONE, parts_with(Scripted()))
    return cfg


Change = Callable[[SelectConfig, Path], SelectConfig]


def with_(**changes: Any) -> Change:
    return lambda cfg, folder: replace(cfg, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_(data=DataConfig()), "data.train is not set"),
        (with_(data=DataConfig(train="no/such")), "no such file or folder: no/such: check data.train"),
        (with_(shard_examples=0), "shard_examples is 0: set it to 1 or more"),
        (with_(rollout=RolloutConfig(group_size=1)), "group_size is 1: set it to 2 or more"),
        (with_(rollout=RolloutConfig(oversample=-1.0)), "rollout.oversample is -1.0: set it to 0 or more"),
        (with_(rollout=RolloutConfig(off_policy_steps=1)), "off_policy_steps is 1 and loss.importance off"),
        (with_(rollout=RolloutConfig(support="replay", top_k=0)), "support is 'replay' with rollout.top_k 0"),
        (with_(loss=LossConfig(importance_cap=0.5)), "loss.importance_cap is 0.5"),
        (with_(reward=RewardConfig(), select=Criteria(score="best")), "select.score is 'best', .*: set reward.judge"),
        (with_(reward=RewardConfig(judge="generative")), "reward.judge_path is not set"),
        (
            with_(select=Criteria(balance=("grade", "domain"))),
            "^select.balance: example e0 has no tag 'domain' .its tags: grade, ",
        ),
        (with_(select=Criteria(num_examples=50)), "num_examples cannot be met: all has 41 of 50 .9 short.*take_all"),
        (
            with_(select=Criteria(balance=("query_type",), num_examples=42)),
            r"select.balance = \['query_type'\] cannot be met: odd has 20 of 21 .1 short",
        ),
        (with_(select=Criteria(balance=("grade",), quotas={"L5": 3})), "quotas names 'L5', .*: use L1, L2, L3, L4"),
        (with_(select=Criteria(balance=("query_type",), quotas={"eve": 3})), "quotas names 'eve', .*; the nearest is 'even'"),
        (
            lambda cfg, _: replace(cfg, data=replace(cfg.data, prompt="{brand}")),
            "has {brand}, but example e0 has no such field",
        ),
        (lambda cfg, folder: replace(cfg, out=cfg.data.train), "out is .*data.jsonl, which is a file: name a folder"),
        (
            lambda cfg, folder: replace(cfg, data=replace(cfg.data, train=str(folder)), records_dir=str(folder)),
            "records_dir is .*, the folder of data.train",
        ),
        (with_(out="same", records_dir="same"), "records_dir and out are both same: give another out"),
        (
            lambda cfg, folder: replace(
                cfg, data=replace(cfg.data, train=f"{folder}/selected.jsonl?split=a"), out=str(folder), format="jsonl"
            ),
            "data.train is .*selected.jsonl, which would be replaced by the selected examples",
        ),
    ],
)
def test_bad_settings_stop_before_anything_is_sampled_or_written(tmp_path: Path, change: Change, message: str) -> None:
    cfg, engine = config(tmp_path), Scripted()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(change(cfg, tmp_path), ONE, parts_with(engine))
    assert engine.calls == 0 and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_context": 85}, "the prompt of example e0 has .* raise policy.max_context"),
        ({"judge": None}, "nothing can grade step 'query_intent' of example e0: .*set reward.judge"),
    ],
)
def test_what_the_policy_or_the_judge_cannot_do_stops_it_too(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    cfg, engine = config(tmp_path), Scripted()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(cfg, ONE, lambda *_: replace(parts_with(engine)(), **change))
    assert engine.calls == 0 and contents(tmp_path) == before


def test_hosts_that_do_not_share_the_folder_are_found_out(tmp_path: Path) -> None:
    """Rank 1 sees no config.toml although rank 0 has written it."""
    engine = Scripted()
    with pytest.raises(ValueError, match=r"process 1 does not see .*config.toml, which process 0 wrote: .* all hosts share"):
        run(config(tmp_path), Ranks(1, 2, 1, torch.device("cpu")), parts_with(engine))
    assert engine.calls == 0


def test_a_folder_of_no_known_type_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "pairs.txt").write_text("query,title\n")
    with pytest.raises(ValueError, match=r"nothing to read in .*txt: expected \.csv"):
        run(config(tmp_path, tmp_path / "txt"), ONE, parts_with(Scripted()))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no examples"):
        run(config(tmp_path, tmp_path / "empty.jsonl"), ONE, parts_with(Scripted()))


def test_an_empty_selection_says_why_and_keeps_the_records(tmp_path: Path) -> None:
    cfg = config(tmp_path, select=Criteria(difficulty_low=0.95, difficulty_high=0.99))
    with pytest.raises(ValueError, match=r"leaves none of 41 examples \(.* too hard.*\): widen select.difficulty_low"):
        run(cfg, ONE, parts_with(Scripted()))
    assert len(finished_shards(records_dir(cfg))) == 6 and not out_dir(cfg).exists()
    assert run(replace(cfg, select=Criteria()), ONE, parts_with(Scripted(dies_after=0)))


def test_folders_of_another_configuration_are_refused(never_killed: SelectConfig) -> None:
    before = contents(records_dir(never_killed))
    with pytest.raises(ValueError, match=r"holds a run with group_size = 6, this one has 4: give another records_dir"):
        run(replace(never_killed, rollout=RolloutConfig(group_size=4, max_new_tokens=80)), ONE, parts_with(Scripted()))
    other_chat = replace(never_killed.reward, judge_chat=ChatConfig(system="You judge."))
    with pytest.raises(ValueError, match=r"holds a run with judge_chat\.system = '', this one has 'You judge\.': give another"):
        run(replace(never_killed, reward=other_chat), ONE, parts_with(Scripted()))
    with pytest.raises(ValueError, match=r"selected holds a run with select.num_examples = 0, this one has 3: give another out"):
        run(replace(never_killed, select=Criteria(num_examples=3)), ONE, parts_with(Scripted()))
    assert contents(records_dir(never_killed)) == before
    unrelated = replace(never_killed, num_steps=7, loss=replace(never_killed.loss, kl_coef=0.0))
    assert run(unrelated, ONE, parts_with(Scripted(dies_after=0)))


def test_changed_data_is_refused(never_killed: SelectConfig, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with pytest.raises(Killed):
        run(cfg, ONE, parts_with(Scripted(dies_after=4)))
    before = contents(records_dir(cfg))
    data = Path(cfg.data.train)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0].replace("title 0", "title zero"), *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"records-000000.parquet was made from other data than the present examples e0 to e7"):
        run(cfg, ONE, parts_with(Scripted()))
    data.write_text("\n".join(lines[:8]) + "\n")
    with pytest.raises(ValueError, match="has 3 more shards than"):
        run(cfg, ONE, parts_with(Scripted()))
    data.write_text("\n".join([*lines, lines[3]]) + "\n")
    with pytest.raises(ValueError, match="line 42: example_id 'e3' occurs a second time"):
        run(cfg, ONE, parts_with(Scripted()))
    assert contents(records_dir(cfg)) == before


def test_records_of_unknown_settings_are_not_taken(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    run(cfg, ONE, parts_with(Scripted()))
    (records_dir(cfg) / "config.toml").unlink()
    with pytest.raises(ValueError, match=r"has records, but no config\.toml .*: give another records_dir"):
        run(cfg, ONE, parts_with(Scripted()))


def test_a_damaged_file_of_records_can_be_made_again(never_killed: SelectConfig, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    run(cfg, ONE, parts_with(Scripted()))
    path = records_dir(cfg) / "records-000003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"records-000003.parquet: not a readable file of records .*: remove it"):
        run(cfg, ONE, parts_with(Scripted()))
    path.unlink()
    engine = Scripted()
    run(cfg, ONE, parts_with(engine))
    assert engine.sampled == Counter({f"e{i}": 1 for i in range(24, 32)}) and results(cfg) == results(never_killed)
