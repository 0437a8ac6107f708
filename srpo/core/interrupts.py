"""Ctrl-C and SIGTERM: a program ends with one line, within GRACE_S seconds, whatever it is waiting for.

The signal raises KeyboardInterrupt in the main thread, which closes engines and files on its way out. A thread watches over that:
it ends the process if the way out takes too long, as in a collective whose peer is silent, and at a second signal.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_S = 4.0
_WORDS = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

_callbacks: list[Callable[[], object]] = []
_watch: _Watch | None = None  # of this process, from `end_at_signals` on


def at_interrupt(callback: Callable[[], object]) -> Callable[[], None]:
    """Call `callback` on another thread as soon as a signal comes, to end waits that would hold up the way out.

    Returns a function that takes the callback back.
    """
    _callbacks.append(callback)

    def forget() -> None:
        with suppress(ValueError):
            _callbacks.remove(callback)

    return forget


def end_at_signals() -> None:
    """From now on a signal ends this process at once, with one line; inside `ended_by_signals` after closing what is open.

    A signal that the process ignores, as under nohup, or handles otherwise stays as it is. Does nothing outside the main thread.
    """
    global _watch
    if _watch is None and threading.current_thread() is threading.main_thread():
        _watch = _Watch()


def is_a_program() -> bool:
    """Whether this process is `python -m srpo.PROGRAM`."""
    name = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "")
    return name.startswith("srpo.") and name.count(".") == 1


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A with block that ends the process at a signal, with one line. Any error after the signal counts as caused by it."""
    global _watch
    end_at_signals()
    watch = _watch
    if watch is not None:
        watch.closes = True
    try:
        yield
    except BaseException as error:
        number = watch.caught if watch is not None else None
        if number is None and not isinstance(error, KeyboardInterrupt):
            raise
        number = number or int(signal.SIGINT)
        if watch is None or watch.first_to_tell():
            print(_WORDS[number], file=sys.stderr, flush=True)
        if watch is not None and watch.caught is not None:
            atexit._run_exitfuncs()  # closes engines
            sys.stdout.flush()
            os._exit(128 + number)  # taking down the interpreter and torch can last seconds, and no thread watches over it
        sys.exit(128 + number)
    finally:
        if watch is not None and watch.caught is None:  # else it goes on until the process has ended
            watch.stop()
            _watch = None


class _Watch:
    """Handlers of the signals and the thread that reads them from a pipe: it runs even while the main thread runs no Python."""

    def __init__(self) -> None:
        self.caught: int | None = None  # the first signal
        self.closes = False  # whether the main thread has something to close
        self._told = threading.Lock()
        self._old = {number: signal.getsignal(number) for number, usual in _USUAL.items() if signal.getsignal(number) == usual}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="interrupts", daemon=True)
        self._thread.start()
        for number in self._old:
            signal.signal(number, self._handle)

    def stop(self) -> None:
        """Restore everything. Only without a signal caught."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def first_to_tell(self) -> bool:
        """Whether the line is still to be printed, by this rank."""
        return self._told.acquire(blocking=False) and os.environ.get("RANK", "0") == "0"

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.caught is None:  # a later one does not disturb the way out
            self.caught = number
            if not self.closes:
                self._end(number)
            raise KeyboardInterrupt

    def _run(self) -> None:
        if (number := self._next()) is None:
            return
        timer = threading.Timer(GRACE_S, self._end, [number])
        timer.daemon = True
        timer.start()
        for callback in list(_callbacks):
            callback()
        if self._next() is not None:
            self._end(number)

    def _next(self) -> int | None:
        """The next of our signals; None once the other end is closed."""
        while byte := os.read(self._read, 1):
            if byte[0] in self._old:
                return byte[0]
        return None

    def _end(self, number: int) -> None:
        if self.first_to_tell():
            os.write(2, f"{_WORDS[number]}\n".encode())
        os._exit(128 + number)
