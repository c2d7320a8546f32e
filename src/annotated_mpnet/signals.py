"""Stopping on request: Ctrl-C (SIGINT), a scheduler (SIGTERM), a closed terminal (SIGHUP).

    where                          what a signal does           what is lost
    -----------------------------  ---------------------------  -------------------------------
    importing                      waits for its end            nothing
    reading and packing text       unwinds the stack            a scratch directory
    in the training loop           noted; save, then stop       nothing; an evaluation is repeated
    in the test and the export     unwinds the stack            nothing: --resume makes them

In the loop an update would be half done, so the signal is only noted, and the loop stops between
two updates, after saving a checkpoint. Further signals change nothing. SIGKILL is safe at any
moment (`checkpoints/checkpoint.py`). Schedulers send it about half a minute after SIGTERM, so an
update and a checkpoint should take less than that.

A signal that was ignored when the program started stays ignored: `nohup` starts programs so that
they outlive their terminal, and a shell starts `command &` so that Ctrl-C is for others.

>>> request = StopRequest()
>>> with listening(request):
...     for update in range(1000):
...         if update == 2:
...             signal.raise_signal(signal.SIGTERM)
...             signal.raise_signal(signal.SIGINT)
...         done = update + 1
...         if request.number is not None:
...             break
>>> done, signal.Signals(request.number).name
(3, 'SIGTERM')

Outside of the loop:

>>> try:
...     with listening():
...         signal.raise_signal(signal.SIGTERM)
... except Stopped as stopped:
...     print(stopped, stopped.exit_code)
SIGTERM 143

Under torchrun a signal reaches the processes at different moments. The loop exchanges what was
noted, and all processes stop after the same update (`mpnet/loop.py`).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
IMPORT_WAIT = 0.05
"""Seconds after which a signal that came during an import is raised again."""


class Stopped(BaseException):
    """The run stopped because a signal asked for it.

    Not an `Exception`: it must pass through all code, ours and the libraries', that catches
    `Exception` to retry.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The code that shells use for a process that a signal ended: 130, 143 or 129."""
        return 128 + self.number


class StopRequest:
    """A signal handler that notes the first signal in `number`.

    It does nothing else, because it may interrupt any line, even one that holds a lock or writes a
    file.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. The first one decides the exit code."""
        if self.number is None:
            self.number = number


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal by raising `Stopped` from wherever the program is, but not from an import.

    Some libraries import others from C++ and drop the exception. The program would go on with half
    a module, so the signal is raised again until the import is over.
    """
    if not _is_importing(frame):
        raise Stopped(number)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, IMPORT_WAIT)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def listening(handler: StopRequest | None = None) -> Iterator[None]:
    """Within the block, note signals in `handler`, or without one stop at once.

    Blocks may be nested. The previous handlers come back at the end of the block:

    >>> before = signal.getsignal(signal.SIGINT)
    >>> with listening():
    ...     with listening(request := StopRequest()):
    ...         inner = signal.getsignal(signal.SIGINT)
    ...     outer = signal.getsignal(signal.SIGINT)
    >>> inner is request, outer is stop_at_once, signal.getsignal(signal.SIGINT) is before
    (True, True, True)

    A signal that is ignored stays ignored. Does nothing outside the main thread, where Python does
    not allow signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = [signal.signal(number, handler or stop_at_once) for number in heard]
    try:
        yield
    finally:
        for number, old in zip(heard, previous, strict=True):
            signal.signal(number, old)


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent, a process id, has ended.

    A parent that is killed sends no message, but the system gives its children another parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
