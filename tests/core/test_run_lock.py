from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_world as small

from srpo.core.run_lock import LOCK, FolderInUse, run_lock

HOLD = "import sys, time; from srpo.core.run_lock import run_lock; from pathlib import Path; import types\n"
HOLD += "ranks = types.SimpleNamespace(is_main=True, broadcast_object=lambda x: x)\n"
HOLD += "with run_lock(Path(sys.argv[1]), ranks): print('held', flush=True); time.sleep(60)"


def holder(folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{small.ROOT}{os.pathsep}{small.ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_one_process_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    process = holder(folder)
    try:
        with pytest.raises(FolderInUse, match=rf"pid {process.pid} on .* works in {folder}"), run_lock(folder, small.ONE):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / LOCK).is_file()  # a killed process cannot remove it
    with run_lock(folder, small.ONE):
        assert (folder / LOCK).read_text().startswith(f"pid {os.getpid()} on ")


def test_stages_of_one_process_share_the_folder_and_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with run_lock(folder, small.ONE), run_lock(folder / ".." / "run", small.ONE):
        assert (folder / LOCK).is_file()
        with run_lock(folder, small.ONE):
            pass
        assert (folder / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []  # the folders were made for the lock
    with run_lock(folder, small.ONE):
        (folder / "x").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_an_error_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path, small.ONE):
        raise KeyboardInterrupt
    process = holder(tmp_path)
    process.kill()
    process.wait()


def test_the_lock_is_taken_by_one_of_many(tmp_path: Path) -> None:
    """Several processes that start at once, over and over: never two inside."""
    script = "import os, sys, time, types; from srpo.core.run_lock import *; from pathlib import Path\n"
    script += "ranks = types.SimpleNamespace(is_main=True, broadcast_object=lambda x: x)\n"
    script += "until = time.monotonic() + 1.5; wins = 0\n"
    script += "while time.monotonic() < until:\n"
    script += "    try:\n        with run_lock(Path(sys.argv[1]), ranks):\n"
    script += "            os.close(os.open(sys.argv[1] + '.inside', os.O_CREAT | os.O_EXCL)); wins += 1\n"
    script += "            os.unlink(sys.argv[1] + '.inside')\n    except FolderInUse: pass\n"
    script += "assert wins, 'never'"
    env = {**os.environ, "PYTHONPATH": f"{small.ROOT}{os.pathsep}{small.ROOT / 'kernels'}"}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    started = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
