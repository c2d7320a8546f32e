"""The book's numbers, sooner: faster ways to compute what `mpnet/` computes.

`attention` lists the ways to compute attention: the book's two, `blocked_attention` for CPUs, and
`triton_attention` with `triton_kernels` for GPUs, which `kernel_check` tries on a card.
`projection` is the product with the vocabulary. `recording` has a GPU replay a micro-batch,
`compilation` has torch.compile generate kernels, and `allocator` keeps memory that a CPU would ask
for again in every step.

Only `training/`, `runs/` and the benchmarks import this room. `mpnet/` does not know it: the model
is handed what it needs: an `Attention`, a product, a way to run a micro-batch.
"""
