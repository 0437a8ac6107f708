"""Ends a process of an engine as soon as the trainer has ended, even while it imports, loads or computes."""

from __future__ import annotations

import os
import select
import threading
import time

TRAINER = "SRPO_ENGINE_TRAINER"  # environment variable of all processes of an engine: the trainer's process id
_POLL_S = 0.5
_watching = False


def end_with_trainer() -> None:
    """End this process when the trainer ends, at once if it has ended already. Call it before imports that take seconds.

    The trainer's id is passed on, because a process that asks for its parent may be an orphan by then.
    """
    global _watching
    if _watching or TRAINER not in os.environ:
        return
    _watching, trainer = True, int(os.environ[TRAINER])
    try:
        fd: int | None = os.pidfd_open(trainer)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel without such descriptors
        fd = None
    threading.Thread(target=_wait, args=(trainer, fd), name="orphan", daemon=True).start()


def _wait(trainer: int, fd: int | None) -> None:
    try:
        while fd is None:
            os.kill(trainer, 0)
            time.sleep(_POLL_S)
        select.select([fd], [], [])
    except ProcessLookupError:
        pass
    os._exit(1)
