"""The last line on a person's screen, which says how far a run is, and is gone when that ends."""

import logging
import os
import sys
from threading import Lock
from typing import Any, TextIO

from rich.console import Console

SEPARATOR = "  "


def live_line(console: Console) -> "TerminalLine | NotebookLine | None":
    """Where the line can be shown; None where what is printed stays."""
    if console.is_jupyter:
        return NotebookLine()
    return TerminalLine(console) if console.is_terminal and not console.is_dumb_terminal else None


class TerminalLine:
    """Below all that is printed, no wider than the terminal. It starts with the first that there is to show."""

    def __init__(self, console: Console) -> None:
        self.console, self.lock = console, Lock()  # the lock: news may arrive while another thread closes
        self.live: Any = None
        self.closed = False

    def show(self, parts: list[str]) -> None:
        """Shows as many of them as there is room for, the first ones first; none clear the line."""
        from rich.text import Text

        with self.lock:
            if self.closed or not (self.live or parts):
                return
            if self.live is None:
                self._start()
            text = fitting(parts, self.console.width - 1)  # in the last column some terminals begin a new line
            self.live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _start(self) -> None:
        from rich.live import Live

        before = sys.stdout, sys.stderr
        # What is printed comes above the line. Errors that go to a file are to stay there.
        errors = before[1] is not None and before[1].isatty()
        # It is drawn when there is news only: whoever stops in a debugger has the terminal to themselves.
        self.live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stderr=errors)
        self.live.start()
        redirect_loggers(before, (sys.stdout, sys.stderr))

    def close(self) -> None:
        """Clears the line, for good, and shows the cursor."""
        with self.lock:
            self.closed = True
            if self.live:
                now = sys.stdout, sys.stderr
                try:
                    for stream in filter(None, now):
                        stream.flush()  # a line that was not ended
                finally:
                    self.live.stop()
                    redirect_loggers(now, (sys.stdout, sys.stderr))


class NotebookLine:
    """Part of the cell's output."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, parts: list[str]) -> None:
        """Shows them in place of those before."""
        from IPython.display import display

        shown = {"text/plain": SEPARATOR.join(parts)}
        if self.handle:
            self.handle.update(shown, raw=True)
        elif parts:
            self.handle = display(shown, raw=True, display_id=True)

    def close(self) -> None:
        """Clears it."""
        self.show([])


def fitting(parts: list[str], width: int) -> str:
    """As many of the parts as there is room for, and the first."""
    line = SEPARATOR.join(parts[:1])
    for part in parts[1:]:
        if len(line) + len(SEPARATOR) + len(part) > width:
            break
        line += SEPARATOR + part
    return line


def redirect_loggers(before: tuple[TextIO, TextIO], now: tuple[TextIO, TextIO]) -> None:
    """Has the root logger's handlers that write to one of the streams `before` write to that of `now`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            handler.setStream(now[before.index(handler.stream)])


def leave_line() -> None:
    """Has a process that is forked write to the terminal itself: it would wait for locks of threads that it lacks."""
    sys.stdout, sys.stderr = (getattr(stream, "rich_proxied_file", stream) for stream in (sys.stdout, sys.stderr))


os.register_at_fork(after_in_child=leave_line)
