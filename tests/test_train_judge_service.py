"""srpo.train with a judge behind a URL: the same numbers as a local judge, also if the server fails, returns or stays away."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
from judge_server import Answer, Asked, chat, free_port, serving

import srpo.train
from srpo.core.batch import read_rollouts
from srpo.core.metrics import read_metrics
from srpo.data.readers import write_examples
from srpo.rewards.build import build_judge, judge_metrics
from srpo.rewards.verdicts import render_verdicts
from srpo.train import main, train

ERROR_500 = Answer(b'{"error": {"message": "out of memory"}}', 500)


def opinion(call: Asked) -> Answer:
    """Verdicts on the steps, a function of the prompt alone."""
    draws = hashlib.sha256(call.prompt.encode()).digest()
    return chat(render_verdicts([draw % 4 != 0 for draw in draws[:5]]))


def settings(world: Any, run_dir: Path, port: int, **changes: Any) -> Any:
    reward = {
        "judge": "generative",
        "judge_engine": "url",
        "judge_url": f"http://127.0.0.1:{port}/v1",
        "judge_model": "r_phi",
        "judge_backoff_s": 0.01,
        "judge_retries": 1,
    }
    return world.config(run_dir, num_steps=4, train={"checkpoint_every": 1}, reward=reward | changes)


def contents(run_dir: Path) -> tuple[bytes, bytes]:
    return (run_dir / "metrics.jsonl").read_bytes(), (run_dir / "rollouts.jsonl").read_bytes()


def test_a_judge_that_goes_away_stops_the_run_which_then_goes_on(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with serving(opinion, port):
        train(settings(world, tmp_path / "straight", port), small.ONE)
    straight = contents(tmp_path / "straight")
    assert any("judge" in (r.reward_sources or ()) for _, r in read_rollouts(tmp_path / "straight" / "rollouts.jsonl"))

    cfg = settings(world, tmp_path / "run", port, judge_cache=0)
    line = small.complaint(main, cfg, tmp_path, capsys)  # no server is running when the run starts
    assert f"the judge at http://127.0.0.1:{port}/v1 gave no answer in 2 attempts" in line and "ConnectError" in line
    assert not (tmp_path / "run").exists()

    def breaks(call: Asked) -> Answer:
        return opinion(call) if call.number < 30 else ERROR_500

    with serving(breaks, port):
        line = small.complaint(main, cfg, tmp_path, capsys)
    assert "HTTP 500 'out of memory'" in line and "run the same command again" in line
    num_done = len(small.metrics_of(tmp_path / "run"))
    assert 0 < num_done < 4
    other = free_port()  # on resume, address and waiting times may differ
    with serving(opinion, other) as server:
        train(settings(world, tmp_path / "run", other, judge_retries=3), small.ONE)
        assert 0 < len(server.asked) <= 1 + 16 * (4 - num_done)
    assert contents(tmp_path / "run") == straight


def test_a_run_may_go_on_without_its_judge(world: Any, tmp_path: Path) -> None:
    def breaks(call: Asked) -> Answer:
        return opinion(call) if call.number < 17 else ERROR_500

    port = free_port()
    with serving(breaks, port):
        train(settings(world, tmp_path, port, judge_fallback="missing", judge_cache=0), small.ONE)
    lines = small.metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    fractions = [line["reward/missing_frac"] for line in lines]
    assert fractions[0] < 1 and fractions[-1] == 1, fractions
    for step, rollout in read_rollouts(tmp_path / "rollouts.jsonl"):
        pairs = list(zip(rollout.reward_sources or (), rollout.step_rewards or (), strict=True))
        assert step < 4 or all(source != "judge" for source, _ in pairs)
        assert all(reward == 0 for source, reward in pairs if source == "no_verdict")


@pytest.mark.parametrize("content", [None, ["Step 1 is [Correct]"], "  ", "<think>Step 1 looks right ..."])
def test_a_judge_that_never_says_anything_is_told_or_stops_the_run(
    content: Any, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda call: chat(content)) as server:
        cfg = settings(world, tmp_path / "run", server.port)
        line = small.complaint(main, replace(cfg, reward=replace(cfg.reward, audit="stop")), tmp_path, capsys)
        assert "no verdict on 100% of the steps left to it" in line and "reward.judge_max_new_tokens" in line
        cfg = replace(cfg, run_dir=str(tmp_path / "told"), num_steps=2)
        train(cfg, small.ONE)
    assert capsys.readouterr().out.count("no verdict on 100%") == 1
    assert all(line["reward/missing_frac"] == 1 for line in small.metrics_of(tmp_path / "told"))
    timing = read_metrics(tmp_path / "told" / "timing.jsonl")
    silent = not isinstance(content, str) or not content.strip()
    assert all(line["service/num_no_text"] == (line["service/num_calls"] if silent else 0) for line in timing)


def test_a_resumed_run_asks_what_the_straight_one_asked(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs and a cold policy: the same responses come again and again, and the cache knows those since the checkpoint."""
    write_examples(tmp_path / "two.jsonl", world.examples()[:2])
    asked: list[int] = []

    def counted(*args: Any) -> Any:
        asked.append(len(server.asked))
        if stops and len(asked) == 3:
            raise KeyboardInterrupt
        return real(*args)

    real = srpo.train.collect
    monkeypatch.setattr(srpo.train, "collect", counted)
    with serving(opinion) as server:
        cfg = settings(world, tmp_path / "straight", server.port, judge_fallback="missing")
        cfg = small.changed(cfg, {"data": {"train": str(tmp_path / "two.jsonl")}, "train": {"checkpoint_every": 2}})
        cfg = small.changed(cfg, {"rollout": {"num_prompts": 2, "temperature": 0.1}, "sampler": {"difficulty_low": -1.0}})
        stops = False
        train(cfg, small.ONE)
        straight = Counter(call.prompt for call in server.asked[asked[2] :])
        assert straight & Counter(call.prompt for call in server.asked[: asked[2]])  # asked before the checkpoint, too
        stops, cfg = True, replace(cfg, run_dir=str(tmp_path / "stopped"))
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            train(cfg, small.ONE)
        stops, before = False, len(server.asked)
        train(cfg, small.ONE)
        resumed = Counter(call.prompt for call in server.asked[before + 1 :])  # the first one is the probe
    assert resumed == straight


def test_what_the_judge_did_is_counted_and_the_key_is_in_no_file(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-73-secret")
    with serving(opinion) as server:
        cfg = settings(world, tmp_path / "run", server.port)
        train(cfg, small.ONE)
        assert all(call.headers["Authorization"] == "Bearer sk-73-secret" for call in server.asked)
        written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert len(written) > 5 and not any(b"sk-73" in path.read_bytes() for path in written)

        judge = build_judge(cfg, cfg.schema, small.ONE)
        assert judge is not None
        sampled = [r for _, r in read_rollouts(tmp_path / "run" / "rollouts.jsonl")][:12]
        examples = {example.example_id: example for example in world.examples()}
        before = len(server.asked)
        for _ in range(2):
            judge.judge(sampled, [examples[r.example_id] for r in sampled])
        num_different = len({(r.example_id, r.text) for r in sampled})
        assert len(server.asked) - before == num_different
        metrics = judge_metrics(judge, small.ONE)
        assert metrics["service/num_calls"] == num_different
        assert metrics["service/cache_hit_frac"] == pytest.approx(1 - num_different / 24)
        assert judge_metrics(None, small.ONE) == {}
    from srpo.core.metrics import MetricsLogger

    with MetricsLogger(tmp_path / "log") as logger:
        logger.log(1, metrics | {"reward/total": 1.0})
    assert read_metrics(tmp_path / "log" / "timing.jsonl") == [json.loads(json.dumps({"step": 1, **metrics}))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_url": ""}, r"reward\.judge_url is not set"),
        ({"judge_engine": "local"}, r"reward\.judge_path is not set"),
        ({"judge_engine": "local", "judge_path": "x"}, r"reward\.judge_url is set"),
        ({"judge": "oracle", "judge_url": ""}, "only a generative judge has an engine"),
        ({"judge_concurrency": 0}, r"reward\.judge_concurrency is 0"),
        ({"judge_cache": -1}, r"reward\.judge_cache is -1"),
        ({"judge_url": "http://user:secret@127.0.0.1/v1"}, r"^reward\.judge_url holds more than an address(?!.*secret)"),
        ({"judge_engine": "vllm", "judge_path": "x"}, r"reward\.judge_url is set"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_the_start(
    world: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(world, tmp_path / "run", 9, **changes), small.ONE)
    assert not (tmp_path / "run").exists()


def test_two_engines_have_to_share_a_gpu(world: Any, tmp_path: Path) -> None:
    cfg = world.config(
        tmp_path / "run",
        rollout={"engine": "vllm", "vllm": {"gpu_memory_frac": 0.6}},
        reward={"judge": "generative", "judge_engine": "vllm", "judge_path": "x", "judge_vllm": {"gpu_memory_frac": 0.5}},
    )
    with pytest.raises(ValueError, match=r"add up to 1\.1"):
        train(cfg, small.ONE)
