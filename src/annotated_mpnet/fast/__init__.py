"""The book's numbers, sooner: faster ways to compute what `mpnet/` computes.

`attention` lists the ways to compute attention: the book's two, `blocked_attention` for CPUs, and
`triton_attention` with `triton_kernels` for GPUs. `compilation` has torch.compile generate kernels,
and `allocator` keeps memory that a CPU would ask for again in every step.

Only `training/`, `runs/` and the benchmarks import this room. `mpnet/` does not know it: the model
is handed an `Attention`.
"""
