"""Where the time of a training step goes, part by part, each against its own floor.

    python benchmarks/profile.py [--shape base4|demo|base] [--dropout 0.1] [--precision fp32|bf16]
            [--with ours|permuted|hf|ours-mlm] [--steps 3] [--compile] [--json FILE]

PyTorch's profiler gives the time that each operation took by itself, without those that it called;
here they are added up in parts that have a name, and beside each stands the time that the same
operations would take at the machine's own rates, which are measured first (`roofline.py`): products
at the rate of large products, all else at the rate at which memory is copied. The ratio says where
something is to be gained by computing the same in a better way; the seconds, how much.

The profiler takes some time itself: shares are right, the sum is a little too large. What stands
under "other" is shown by name, so that no part hides there. With --compile, generated kernels are a
part of their own, and there is one floor, that of the operations as they are written.
"""

import sys

if __name__ == "profile":
    # Python has a module of this name, which transformers imports by way of `cProfile`, and a
    # script's own folder comes first in the search. So whoever asks for `profile` gets Python's.
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
