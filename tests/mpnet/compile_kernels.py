"""Compile the Triton kernels for GPUs that need not be there; a test runs this as a process.

Prints a line for each kernel, architecture and set of constants: how many instructions of tensor
cores are in it, and how much shared memory it takes.
"""

from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from annotated_mpnet.fast import triton_kernels
from annotated_mpnet.fast.triton_attention import TILES

HALVES = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
FLOATS = ("log_sum", "mean", "by_distance", "d_by_step")
INTEGERS = ("query_facts", "key_facts", "step_of_distance", "first_distance", "seeds")
TYPES = {"scale": "fp32", "rescale": "fp32"}
TYPES |= dict.fromkeys(HALVES, "*bf16") | dict.fromkeys(FLOATS, "*fp32")
TYPES |= dict.fromkeys(INTEGERS, "*i32")
SIZES = {"K": 64, "WIDE_K": 64, "TILE_Q": TILES.queries, "TILE_M": TILES.keys, "STEPS": 32}


def compile_for(name: str, capability: int, flags: dict[str, bool]) -> str:
    kernel = getattr(triton_kernels, name)
    constants = {key: value for key, value in (SIZES | flags).items() if key in kernel.arg_names}
    signature = {key: TYPES.get(key, "i32") for key in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # Addresses and strides are multiples of 16, as Triton finds them to be in a network.
    aligned = [
        i
        for i, key in enumerate(kernel.arg_names)
        if signature[key].startswith("*") or key.endswith(("_stride", "_sample"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assembly = compiled.asm["ptx"]
    tensor_cores = assembly.count("wgmma.mma_async") + assembly.count("mma.sync")
    return f"{name} sm_{capability} {tensor_cores} {compiled.metadata.shared}"


def main() -> None:
    kernels = ("attend_forward", "attend_backward_keys", "attend_backward_queries")
    for name, capability, on in product(kernels, (80, 90), (False, True)):
        print(compile_for(name, capability, dict.fromkeys(("BIASED", "HIDES", "DROPS"), on)))


if __name__ == "__main__":
    main()
