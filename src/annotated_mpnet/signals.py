"""Being asked to stop: Ctrl-C, a cluster's SIGTERM, a closed terminal.

Where a run may stop is a question of what is half done. Outside the loop nothing is, and it stops
at once. Inside, an update is: half of its gradients, half of a file. There the request is only
noted, and the loop honours it at the next boundary between two updates, after saving a checkpoint.
A second request while it does so changes nothing; a run that must go at once can be killed
(SIGKILL) at any moment without harm to what was saved before (`checkpoint.py`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The run was asked to stop and did. Like KeyboardInterrupt, no error, and not caught as
    one."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells expect of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class StopRequest:
    """Whether, and by which signal, the loop was asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the first one counts."""
        if self.number is None:
            self.number = number


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Answer a signal by unwinding the stack from wherever the program is."""
    raise Stopped(number)


@contextmanager
def listening(handler: StopRequest | None = None) -> Iterator[None]:
    """Within the block, answer signals with a handler: note them, or (without one) stop at once.

    Does nothing outside the main thread, where Python forbids it: a run inside somebody else's
    program then leaves signals to that program.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, handler or stop_at_once) for number in SIGNALS]
    try:
        yield
    finally:
        for number, former in zip(SIGNALS, before, strict=True):
            signal.signal(number, former)
