"""After kill -9 at random moments and the same command again, a run ends with the same bits as one that was never killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_world as small

import srpo.train
import srpo.training.collect
from srpo.core.config.train import Config, StageConfig
from srpo.core.digests import COMPLETE
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.train import train
from srpo.training.run import Run

NUM_STEPS = 10
CHANGES = {
    "num_steps": NUM_STEPS,
    "loss": {"num_updates": 2, "kl_coef": 0.05},
    "sampler": {"balance": "query_type", "refill": 1, "max_age": 4, "difficulty_low": 0.1},
    # The checkpoint of step 3 is in the middle of a plateau, those of steps 6 and 9 are in the middle of a stage.
    "curriculum": (
        StageConfig("first", num_steps=5, metric="reward/total", min_gain=1.0, patience=4),
        StageConfig("second", num_steps=3, tags={"difficulty": ("easy", "medium")}, balance=("query_type", "difficulty")),
        StageConfig("third", balance="grade"),
    ),
    "train": {"checkpoint_every": 3, "eval_every": 4},
}


def settings(world: Any, run_dir: Path) -> Config:
    return world.config(run_dir, data={"eval": str(world.eval)}, **CHANGES)


def differences(run_dir: Path, uninterrupted: dict[str, Any], tmp_path: Path) -> list[str]:
    got = small.outcome(run_dir, tmp_path / "flat.pt")
    return sorted(name for name in got.keys() | uninterrupted.keys() if got.get(name) != uninterrupted.get(name))


@pytest.fixture(scope="module")
def uninterrupted(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a run that was never stopped and that used every kind of state."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(settings(world, folder / "run"), small.ONE)
    lines = small.metrics_of(folder / "run")
    assert [line["sampler/stage"] for line in lines] == [1] * 5 + [2] * 3 + [3] * 2
    assert any(line["rollout/num_refill_rounds"] for line in lines)
    return small.outcome(folder / "run", folder / "flat.pt")


def num_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def has_begun(run_dir: Path) -> Callable[[], bool]:
    """Condition: the next process has opened the files of the run."""
    path = run_dir / "timing.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    return lambda: path.exists() and path.stat().st_mtime_ns > before


def later(reached: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """Condition: `seconds` have passed since `reached` was first true."""
    until: list[float] = []

    def reached_and_waited() -> bool:
        if not until and reached():
            until.append(time.monotonic() + seconds)
        return bool(until) and time.monotonic() >= until[0]

    return reached_and_waited


def is_under_way(run_dir: Path, rng: random.Random) -> Callable[[], bool]:
    """Condition: a random time has passed since the process opened the files of the run."""
    return later(has_begun(run_dir), rng.uniform(0, 0.5))


def has_lines(run_dir: Path, rng: random.Random) -> Callable[[], bool]:
    """Condition: metrics.jsonl has a random number of lines."""
    begun, least = has_begun(run_dir), num_lines(run_dir) // 3 * 3 + 1
    wanted = rng.randint(least, max(least, NUM_STEPS - 4))
    return lambda: begun() and num_lines(run_dir) >= wanted


def is_saving(run_dir: Path, rng: random.Random) -> Callable[[], bool]:
    """Condition: a checkpoint is being written, perhaps with some of its files already complete."""
    root = run_dir / "checkpoints"
    before = set(root.glob("step_*.tmp-*"))  # left by a killed process
    return later(lambda: not before.issuperset(root.glob("step_*.tmp-*")), rng.uniform(0, 0.03))


def start_and_kill(cfg: Config, folder: Path, seed: int, num_ranks: int, extra_kills: int) -> int:
    """Start the run, kill it, start it again, and so on. Returns the number of kills."""
    rng, run_dir = random.Random(seed), Path(cfg.run_dir)
    moments = [is_under_way, is_saving, has_lines, *rng.choices([is_under_way, is_saving, has_lines], k=extra_kills)]
    rng.shuffle(moments)
    num_kills = 0
    for moment in moments:
        program, reached = small.Program("srpo.train", cfg, folder, num_ranks), moment(run_dir, rng)
        try:
            while program.running() and not reached():
                time.sleep(0.001)
            num_kills += program.running()
        finally:
            program.kill()
        checkpoint = latest_checkpoint(run_dir / "checkpoints")
        print(f"{moment.__name__}: {num_lines(run_dir)} lines, last checkpoint {checkpoint}")
        assert checkpoint is None or (checkpoint / COMPLETE).is_file()
    return num_kills


def test_killed_and_started_again_it_ends_the_same(world: Any, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    killed = settings(world, tmp_path / "killed")
    seed = random.randrange(10**6)
    assert start_and_kill(killed, tmp_path / "log", seed, num_ranks=1, extra_kills=0) >= 2
    train(killed, small.ONE)  # like one more process, without the time for its imports
    assert differences(tmp_path / "killed", uninterrupted, tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_often(world: Any, tmp_path: Path, num_ranks: int) -> None:
    uninterrupted, killed = settings(world, tmp_path / "uninterrupted"), settings(world, tmp_path / "killed")
    small.Program("srpo.train", uninterrupted, tmp_path / "log", num_ranks).finish()
    seed = random.randrange(10**6)
    assert start_and_kill(killed, tmp_path / "log", seed, num_ranks, extra_kills=4) >= 3
    small.Program("srpo.train", killed, tmp_path / "log", num_ranks).finish()
    assert differences(tmp_path / "killed", small.outcome(tmp_path / "uninterrupted", tmp_path / "flat.pt"), tmp_path) == []


PHASES = ["generate", "score_rollouts", "refill_step", "assign_credit", "pack_own", "policy_update"]
PHASES += ["evaluate_now", "write_rollouts"]
AT_THE_END = ["save", "save_policies"]


def test_stopped_before_every_phase_it_ends_the_same(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, Any]
) -> None:
    """The same in one process: one run is interrupted before each phase of the loop, in random order and at random steps."""
    seed = random.randrange(10**6)
    rng, cfg = random.Random(seed), settings(world, tmp_path / "stopped")
    past_one = rng.choice([phase for phase in PHASES if phase != "evaluate_now"])
    for phase in [*rng.sample(PHASES, len(PHASES)), *AT_THE_END]:
        # Interrupt within the three steps up to the next checkpoint, so that steps remain for all phases; one phase goes past it.
        calls_left = 4 if phase == past_one else 1 if phase in ("evaluate_now", *AT_THE_END) else rng.randint(1, 3)
        place = next(place for place in (Run, srpo.training.collect, srpo.train) if hasattr(place, phase))
        original = getattr(place, phase)

        def stopping(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if not calls_left:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, phase, stopping)
            train(cfg, small.ONE)
    train(cfg, small.ONE)
    assert differences(tmp_path / "stopped", uninterrupted, tmp_path) == []


def test_a_half_written_checkpoint_is_never_chosen(
    world: Any, tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(world, tmp_path / "run")

    def stopping(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_policies", stopping)
        train(cfg, small.ONE)
    root = tmp_path / "run" / "checkpoints"
    newest = latest_checkpoint(root)
    assert newest is not None and newest == root / f"step_{NUM_STEPS:06d}"
    newest.rename(root / f"step_{NUM_STEPS:06d}.tmp-77")  # as after a kill before the rename
    half = root / "step_000099"  # as after an incomplete copy
    half.mkdir()
    (half / "rank_0.pt").write_bytes(b"")
    assert latest_checkpoint(root) == root / "step_000009"
    train(cfg, small.ONE)
    half.joinpath("rank_0.pt").unlink()
    assert differences(tmp_path / "run", uninterrupted, tmp_path) == []
    assert not list(root.glob("*.tmp-*"))
