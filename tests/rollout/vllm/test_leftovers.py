"""An engine's process leaves nothing behind: no process, shared memory, socket or file, whatever is killed when."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from srpo.rollout.vllm import leftovers
from srpo.rollout.vllm.orphan import TRAINER
from srpo.rollout.vllm.process import EngineFailure, EngineProcess

ROOT = Path(__file__).resolve().parents[3]
# Shared memory, a file and a socket in the temporary folder, and a child that holds them, too. Its name tells how it ends.
CODE = """
import json, os, socket, subprocess, sys, tempfile, time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

channel = Connection(int(sys.argv[-2]))
memory = SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")  # as if the tracker had been killed, too
file = tempfile.NamedTemporaryFile(delete=False)
server = socket.socket(socket.AF_UNIX)
server.bind(os.path.join(tempfile.gettempdir(), "socket"))
child = subprocess.Popen(["sleep", "300"])
channel.send_bytes(json.dumps({"memory": memory.name, "file": file.name, "child": child.pid}).encode())
op, _ = channel.recv()
if op == "close" and sys.argv[-3] == "ends":
    child.kill()
    child.wait()
    os._exit(0)
time.sleep(300)
"""

LATE = """
import json, sys, time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

channel = Connection(int(sys.argv[-2]))
channel.send_bytes(b"{}")
channel.recv()
channel.send_bytes(json.dumps({"memory": SharedMemory(create=True, size=4096).name}).encode())
time.sleep(300)
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The root of temporary folders."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["ends", "hangs"])
@pytest.mark.parametrize("stop", ["close", "kill", "dies"])
def test_everything_of_an_engine_is_removed(how: str, stop: str, folders: Path) -> None:
    process = EngineProcess(["-c", CODE, how], timeout_s=20)
    facts = process.receive()
    (folder,) = folders.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and Path(facts["file"]).parent == folder
    begin = time.monotonic()
    if stop == "dies":
        os.kill(process.pid, 9)
        with pytest.raises(EngineFailure, match="died with exit code -9"):
            process.receive()
    if stop == "kill":
        process.kill()
    if stop != "close":
        assert {path.name for path in folder.iterdir()} == {process.log.name, leftovers.OWNER}  # the log is for the error message
    process.close()
    process.close()
    assert time.monotonic() - begin < (5 if how == "hangs" and stop == "close" else 2)
    assert not leftovers.members(process.pid)
    with pytest.raises(FileNotFoundError):
        SharedMemory(facts["memory"])


def test_shared_memory_of_a_worker_that_died_with_its_engine_is_removed(folders: Path) -> None:
    """It came after the engine's first reply, and nobody has it mapped any more: only the engine's resource tracker knows it."""
    process = EngineProcess(["-c", LATE], timeout_s=20)
    process.receive()
    process.send("make")
    name = process.receive()["memory"]
    os.kill(process.pid, 9)
    with pytest.raises(EngineFailure, match="died"):
        process.receive()
    process.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)


def test_the_log_of_an_engine_that_died_stays_for_a_while(folders: Path) -> None:
    process = EngineProcess(["-c", "raise SystemExit('no memory')"], timeout_s=20)
    with pytest.raises(EngineFailure, match="died with exit code 1"):
        process.receive()
    (folder,) = folders.iterdir()
    assert process.log.read_text() == "no memory\n"
    os.utime(folder, (0, 0))
    other, lock = leftovers.make_folder()
    assert list(folders.iterdir()) == [other]
    lock.close()
    leftovers.empty_folder(other, keep=())
    other.rmdir()


def test_folders_of_trainers_that_have_ended_are_swept(folders: Path) -> None:
    old, lock = leftovers.make_folder()
    (old / "socket").touch()
    os.utime(old, (0, 0))
    mine, my_lock = leftovers.make_folder()
    assert old.exists()  # its trainer lives
    lock.close()
    young, young_lock = leftovers.make_folder()
    young_lock.close()
    last, last_lock = leftovers.make_folder()
    assert not old.exists() and mine.exists() and young.exists()
    for folder, held in ((mine, my_lock), (young, young_lock), (last, last_lock)):
        leftovers.empty_folder(folder, keep=())
        held.close()
        folder.rmdir()


@pytest.mark.parametrize("module", ["srpo.rollout.vllm.worker", "srpo.rollout.vllm.shards"])
def test_an_orphan_ends_before_its_imports(module: str) -> None:
    """A whole engine takes many seconds to import and load: it would meet the trainer's next start."""

    def start(trainer: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", TRAINER: str(trainer)}
        command = [sys.executable, "-X", "importtime", "-m", module, "0", "0"]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    trainer = subprocess.Popen(["true"])
    trainer.wait()
    orphan = start(trainer.pid)
    _, imported = orphan.communicate(timeout=60)
    assert orphan.returncode == 1 and b"srpo.rollout.vllm" in imported and b"torch" not in imported

    trainer = subprocess.Popen(["sleep", "60"])
    orphan = start(trainer.pid)
    assert orphan.stderr is not None
    while b"numpy" not in orphan.stderr.readline():  # the imports have begun
        assert orphan.poll() is None
    trainer.kill()
    trainer.wait()
    begin = time.monotonic()
    orphan.communicate(timeout=60)
    assert orphan.returncode == 1 and time.monotonic() - begin < 3
