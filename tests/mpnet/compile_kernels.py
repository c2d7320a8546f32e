"""Compile the Triton kernels without a GPU; a test runs this in its own process.

Prints a line for each kernel, architecture and set of constants: the number of tensor core
instructions, the shared memory it needs, and the shared memory there is.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from annotated_mpnet.fast import triton_kernels
from annotated_mpnet.fast.triton_attention import TUNED, USUAL, Launch

HALVES = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")
FLOATS = ("log_sum", "mean", "strip", "d_until")
INTEGERS = ("query_facts", "key_facts", "end_of_step", "keys_before", "seeds")
TYPES = {"scale": "fp32", "rescale": "fp32"}
TYPES |= dict.fromkeys(HALVES, "*bf16") | dict.fromkeys(FLOATS, "*fp32")
TYPES |= dict.fromkeys(INTEGERS, "*i32")
SIZES = {"K": 64, "WIDE_K": 64, "STEPS": 32}


def compile_for(name: str, capability: int, how: Launch, flags: dict[str, bool]) -> str:
    kernel = getattr(triton_kernels, name)
    sizes = SIZES | {"TILE_Q": how.queries, "TILE_M": how.keys}
    constants = {key: value for key, value in (sizes | flags).items() if key in kernel.arg_names}
    signature = {key: TYPES.get(key, "i32") for key in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # In a network, Triton finds that addresses and strides are multiples of 16.
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
    options = {"num_stages": how.stages, "maxnreg": how.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembly = compiled.asm["ptx"]
    tensor_cores = assembly.count("wgmma.mma_async") + assembly.count("mma.sync")
    return f"{name} sm_{capability} {tensor_cores} {compiled.metadata.shared}"


def main() -> None:
    for (name, natural), tuned in TUNED.items():
        # The dense block with nothing masked, and the staircase with everything.
        flags = dict.fromkeys(("EVEN_Q", "EVEN_M", "NATURAL"), natural)
        flags |= dict.fromkeys(("HIDES", "DOCUMENTS", "DROPS", "ADDS"), not natural)
        for capability, how in ((80, USUAL), (90, USUAL), (90, tuned)):
            # Shared memory of a consumer card, and of an H100.
            limit = 99 if how is USUAL else 227
            print(compile_for(name, capability, how, {"BIASED": True} | flags), 1024 * limit)


if __name__ == "__main__":
    main()
