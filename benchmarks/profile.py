"""Where the time of a training step goes, and how far each part is from its floor.

    python benchmarks/profile.py [--shape base4|demo|base] [--dropout 0.1] [--precision fp32|bf16]
            [--with ours|permuted|hf|ours-mlm] [--steps 3] [--compile] [--json FILE]

PyTorch's profiler gives the time of each operation, without the operations that it calls. The table
sums these times by kind. The floor is the time that the same operations would take at the machine's
own rates, which are measured first (`roofline.py`): products at the rate of large products,
everything else at the rate of copying memory. The ratio shows where a better implementation would
help, the seconds how much.

The profiler adds some time of its own, so the shares are right but the sum is slightly too large.
The largest operations under "other" are listed. With --compile, generated kernels are one line of
the table, and only the total has a floor.
"""

import sys

if __name__ == "profile":
    # transformers imports Python's module `profile` (through `cProfile`) but would find this file,
    # because a script's folder comes first in the search path. So load Python's module instead.
    import importlib.util
    import sysconfig
    from pathlib import Path

    path = Path(sysconfig.get_path("stdlib"), "profile.py")
    spec = importlib.util.spec_from_file_location("profile", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["profile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["profile"])
elif __name__ == "__main__":
    from step_profile import main

    main()
