"""Progress of long stages: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import SupportsFloat, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Progress of one long stage with the estimated time left: `with Progress("SFT", total) as bar: bar.advance(1, loss=x)`.

    Shows a bar on a terminal (nested stages below one another); elsewhere prints a line every `interval_s` seconds and one at the
    end. `start` is the amount done before this process, for a resumed run. `enabled=False` (all ranks but 0) prints nothing.
    """

    _display: RichProgress | None = None  # the display on the terminal; nested stages share it

    def __init__(
        self,
        description: str,
        total: int,
        *,
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
    ) -> None:
        self.description, self.total, self.done = description, total, start
        self._start, self._enabled, self._interval_s = start, enabled, interval_s
        self._stream = stream or sys.stdout
        self._values: dict[str, float] = {}
        self._began = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._owns_display = False

    def __enter__(self) -> Progress:
        self._began = self._last_line = time.monotonic()
        if self._enabled and self._stream.isatty():
            self._owns_display = Progress._display is None
            self._bar = Progress._display or _display(self._stream)
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, values="")
            if self._owns_display:
                Progress._display = self._bar
                self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None and self._owns_display:
            Progress._display = None
            self._bar.stop()
        elif self._bar is not None:
            self._bar.remove_task(self._task)
        elif self._enabled:
            self._line(f"{'done' if kind is None else 'stopped'} in {_duration(time.monotonic() - self._began)}")

    def advance(self, amount: int = 1, **values: SupportsFloat) -> None:
        """Add `amount` to the work done. `values` are shown next to the bar until new ones of the same name replace them."""
        if not self._enabled:
            return
        self.done += amount
        self._values |= {name: float(value) for name, value in values.items()}
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, values=self._shown())
        elif time.monotonic() - self._last_line >= self._interval_s:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / max(self.done - self._start, 1) * max(self.total - self.done, 0)
            self._line(f"{_duration(left)} left")

    def print(self, text: str) -> None:
        """Print a line (or a table) without breaking the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def _line(self, state: str) -> None:
        percent = 100 * self.done // max(self.total, 1)
        shown = self._shown()
        self.print(f"{self.description} {self.done}/{self.total} ({percent} %), {state}" + (f", {shown}" if shown else ""))

    def _shown(self) -> str:
        return " ".join(f"{name} {value:.4g}" for name, value in self._values.items())


def _display(stream: TextIO) -> RichProgress:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    # The speed is averaged over the last ten minutes, since one step of a stage can take seconds.
    return RichProgress(*columns, TextColumn("{task.fields[values]}"), console=Console(file=stream), speed_estimate_period=600.0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
