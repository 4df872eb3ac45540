"""Ctrl-C for the processes of tests: a process started in the background inherits that it ignores it."""

from __future__ import annotations

import signal

__all__ = ["heed_control_c"]


def heed_control_c() -> None:
    """To be called in a new process before its program starts: SIGINT interrupts it, as at a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
