"""Settings for all tests: few threads, no network, correct shape suffixes."""

import gc
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from waiting import HUNG

if TYPE_CHECKING:
    from tiny_run import TinyText

# Tests send signals. After `pytest &` in a script, Ctrl-C is ignored here and in subprocesses.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# Set before torch and Hugging Face libraries are imported, because they read these only once.
UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
CACHE = tempfile.TemporaryDirectory(prefix="annotated-mpnet-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = CACHE.name
# Tokenizers with their own threads complain when a test forks after using one.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# As the commands do; on busy cores the suite then takes a fraction of the time.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# By default W&B gives up on its own process after 30 and 90 seconds, too early on a busy machine.
os.environ["WANDB__SERVICE_WAIT"] = os.environ["WANDB_INIT_TIMEOUT"] = str(HUNG)

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton reads this when it is imported. With a GPU, the kernels are compiled and run there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings  # noqa: E402

from shape_checker import ShapeChecker  # noqa: E402

torch.set_num_threads(1 if UNDER_XDIST else 2)

# Always the same examples, without time limits: a failure means that the code has changed. To look
# for new examples, run with `--hypothesis-profile=search`.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> "TinyText":
    """A text and its tokenizer, for all tests that do not change them."""
    from tiny_run import write_text  # most tests need none of what it imports

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def debugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what --debug changes in this process and its children."""
    for library in ("DATASETS", "HF_HUB", "TRANSFORMERS"):
        monkeypatch.setenv(f"{library}_VERBOSITY", "")
        monkeypatch.delenv(f"{library}_VERBOSITY")
    yield
    log = logging.getLogger("annotated_mpnet")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that asks the network, whatever the answer would be."""

    def refuse(*_: object) -> None:
        pytest.fail("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pytest_collection_finish() -> None:
    # Runs collect garbage, and need not look for it among all that was imported.
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
    CACHE.cleanup()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test in which a shape suffix is wrong (unless it fails anyway).

    Not for interpreted kernels: they have no PyTorch tensors, and the checker would look at ten
    thousand calls per tile.
    """
    if item.get_closest_marker("interpreted"):
        return (yield)
    with ShapeChecker() as checker:
        result = yield
    checker.raise_lies()
    return result
