"""Compiled layers: the same numbers, the same again, under the same names.

Three layers and one shape, because compiling takes seconds for each graph: three graphs do for
them, one for the layers, one for the last, and one for the loss.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import TINY, random_batch, random_model, relative_difference

from annotated_mpnet.fast.compilation import compile_model, uncompiled
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from waiting import HUNG

pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None,
        reason="no C++ compiler here, which torch.compile needs on a CPU",
    ),
    # PyTorch's compiler uses what PyTorch itself has deprecated, and looks at what it warns of; the
    # latter it hides, but not from tests in which a warning is an error.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor.*:UserWarning"),
]

CONFIG = dataclasses.replace(
    TINY, encoder_layers=3, dropout=0.2, attention_dropout=0.1, activation_dropout=0.3
)
BATCH = random_batch(1, [14, 20, 9], [3, 5, 1])


def step(model: MPNetForPretraining) -> list[torch.Tensor]:
    """Return the loss and each gradient of one step of training."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    loss = model.loss_sum(BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def compiled() -> MPNetForPretraining:
    from torch._dynamo.utils import counters

    # Compiled here and not in a test, whose every function call the checker of shapes looks at: the
    # compiler makes millions of them.
    torch.compiler.reset()
    model = random_model(CONFIG)
    compile_model(model, torch.device("cpu"), lengths_vary=False)
    # The compiler counts for the whole process, and other tests compile too.
    counters.clear()
    step(model)
    assert graphs() == 3
    return model


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="measured: PyTorch 2.11 draws other numbers for dropout in compiled layers on a CPU",
)
def test_loss_and_gradients_are_those_of_the_plain_network_dropout_included(
    compiled: MPNetForPretraining,
) -> None:
    for one, other in zip(step(compiled), step(random_model(CONFIG)), strict=True):
        assert relative_difference(one, other) < 1e-5


def test_a_step_repeated_is_the_same_to_the_bit(compiled: MPNetForPretraining) -> None:
    first = step(compiled)
    for _ in range(3):
        assert all(map(torch.equal, step(compiled), first))


def test_nothing_is_left_out_of_a_graph(compiled: MPNetForPretraining) -> None:
    from torch._dynamo.utils import counters

    step(compiled)
    assert not counters["graph_break"]


def test_layers_may_be_computed_twice_as_well(compiled: MPNetForPretraining) -> None:
    kept = step(compiled)
    compiled.use_gradient_checkpointing(True)
    again = step(compiled)
    compiled.use_gradient_checkpointing(False)
    assert all(map(torch.equal, kept, again))


def test_names_of_weights_stay_as_they_are(compiled: MPNetForPretraining) -> None:
    plain = random_model(CONFIG)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in compiled.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(compiled.state_dict())


def test_evaluation_runs_as_written_and_compiles_nothing(compiled: MPNetForPretraining) -> None:
    plain, before = random_model(CONFIG), graphs()
    other_shape = random_batch(2, [17, 11], [2, 2])
    with torch.no_grad(), uncompiled():
        assert torch.equal(
            compiled.eval().loss_sum(other_shape), plain.eval().loss_sum(other_shape)
        )
    assert graphs() == before


def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    program = (
        "import torch\n"
        "from annotated_mpnet.mpnet.config import ModelConfig\n"
        "from annotated_mpnet.errors import ConfigError\n"
        "from annotated_mpnet.mpnet.pretraining import MPNetForPretraining\n"
        "from annotated_mpnet.fast.compilation import compile_model\n"
        "model = MPNetForPretraining(ModelConfig(encoder_layers=1, vocab_size=9))\n"
        "try:\n"
        "    compile_model(model, torch.device('cpu'), lengths_vary=False)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    # An empty cache, or the kernel of another day would be found there.
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("--compile does not work on cpu here")
    assert "No working C++ compiler" in line
    assert "install a C++ compiler" in line
