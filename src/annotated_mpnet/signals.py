"""Being asked to stop: Ctrl-C, a cluster's SIGTERM, a closed terminal.

Where a run may stop is a question of what is half done. Outside the loop nothing is, and it stops
at once. Inside, an update is: half of its gradients, half of a file. There the request is only
noted, and the loop honours it at the next boundary between two updates, after saving a checkpoint.
A second request while it does so changes nothing; a run that must go at once can be killed
(SIGKILL) at any moment without harm to what was saved before (`checkpoints/checkpoint.py`).

    where                          what a signal does           what is lost
    -----------------------------  ---------------------------  ---------------------------
    reading and packing text       unwinds the stack            a scratch directory
    inside the loop                is noted; save, then stop    nothing
    test and export, behind it     unwinds the stack            these; `convert-to-hf` exports

Here is a loop that is asked to stop in the middle of its third update, and asked again:

>>> request = StopRequest()
>>> with listening(request):
...     for update in range(1000):
...         if update == 2:
...             signal.raise_signal(signal.SIGTERM)
...             signal.raise_signal(signal.SIGINT)
...         done = update + 1  # whatever came, the update is done to its end
...         if request.number is not None:
...             break
>>> done, signal.Signals(request.number).name
(3, 'SIGTERM')

and here a program outside of the loop:

>>> try:
...     with listening():
...         signal.raise_signal(signal.SIGTERM)
... except Stopped as stopped:
...     print(stopped, stopped.exit_code)
SIGTERM 143

**Three signals.** SIGINT is Ctrl-C. SIGTERM comes from a scheduler whose time is up, from
`docker stop` or a machine that shuts down; it is followed by SIGKILL after a while, often half a
minute, so that an update and a checkpoint should fit in there. SIGHUP says that the terminal is
gone. By themselves, all three end a process where it stands; Python makes a KeyboardInterrupt of
the first, and leaves the others as they are.

**Several processes.** torchrun hands a signal on to all of its processes, but not at the same
moment: one is in update 7 and another already in 8. Each would stop at its own next boundary, and
one would wait for gradients of another that has left. So what was noted is exchanged between two
updates, and all stop at the same one (`mpnet/loop.py`).

Next: `mpnet/loop.py`, which asks between two updates; `cli.py`, which makes an exit code of
`Stopped`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those that ask. SIGKILL and SIGSTOP cannot be answered, and SIGPIPE Python has made an error."""


class Stopped(BaseException):
    """The run was asked to stop and did: like KeyboardInterrupt, no error.

    So it is no `Exception`. Between the place where a signal comes and the end of the program there
    are libraries, and ours, that catch `Exception` to try once more, or to say what is wrong with a
    file; a request to stop must pass through all of them.

    >>> issubclass(Stopped, Exception)
    False
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells expect of a process that a signal ended.

        By it, a scheduler tells a run that was stopped from one that is finished (0) or has failed.

        >>> [Stopped(number).exit_code for number in SIGNALS]
        [130, 143, 129]
        """
        return 128 + self.number


class StopRequest:
    """Whether, and by which signal, the loop was asked to stop.

    Python runs a handler between any two of its instructions, in the main thread. So the less it
    does the better: this one sets a number. It takes no lock, which the interrupted line might hold
    already, and writes to no file, into which that line might just be writing.

    Attributes:
        number: of the signal; None as long as there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. The first one counts, so that the exit code says what began it."""
        if self.number is None:
            self.number = number


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Answer a signal by unwinding the stack from wherever the program is."""
    raise Stopped(number)


@contextmanager
def listening(handler: StopRequest | None = None) -> Iterator[None]:
    """Within the block, answer signals with a handler: note them, or (without one) stop at once.

    Blocks may be nested: the loop's, inside the one of the command. At the end of each, signals are
    answered as they were before it, also if it ends with an error; a program that calls a run as a
    function finds its own Ctrl-C again.

    >>> before = signal.getsignal(signal.SIGINT)
    >>> with listening():
    ...     with listening(request := StopRequest()):
    ...         inner = signal.getsignal(signal.SIGINT)
    ...     outer = signal.getsignal(signal.SIGINT)
    >>> inner is request, outer is stop_at_once, signal.getsignal(signal.SIGINT) is before
    (True, True, True)

    Does nothing outside the main thread, where Python forbids it: a run inside somebody else's
    program then leaves signals to that program.

    Args:
        handler: notes signals; None to raise `Stopped` where the program is.
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
