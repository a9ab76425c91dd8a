"""MatMul of two activations, or with constants of more than two axes."""

import math

import onnx_ir as ir

from sparsegraph.lower.builder import Builder, Declined, dtype_of, shape_of
from sparsegraph.program import Arg, Scratch
from sparsegraph.targets.kernels.matrix import kernel_for

_PANEL_BYTES = 4 << 20  # of scratch per thread
_LEAST_ROWS = 32  # of one part: every part copies the panel, which costs about as much as one row


def lower_matrices(b: Builder, node: ir.Node) -> None:
    """Row-major [.., M, K] times [.., K, N]; batches are equal, or one side has a single one.

    Raises:
        Declined: for vectors, other types, batches that broadcast in part, or a very long K.
    """
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None
    assert right is not None
    shapes, out = (shape_of(left), shape_of(right)), shape_of(node.outputs[0])
    if min(map(len, shapes)) < 2 or {dtype_of(left), dtype_of(right)} != {"float32"}:
        raise Declined("a product of vectors, or of other types than float32")
    batches = [math.prod(shape[:-2]) for shape in shapes]
    n_batches, (m, k), n = math.prod(out[:-2]), shapes[0][-2:], out[-1]
    if any(count not in (1, n_batches) for count in batches):
        raise Declined(f"batches {shapes[0][:-2]} and {shapes[1][:-2]} broadcast in part")
    if batches[1] == 1:  # one matrix for all: its batches are more rows
        m, n_batches = m * n_batches, 1
    kernel = kernel_for(n, b.target)
    scratch = kernel.scratch_bytes(k)
    if scratch > _PANEL_BYTES:
        raise Declined(f"{k} terms in every sum")
    x, w = b.row(left), b.row(right)
    y = b.new_row(node.outputs[0])
    panels = -(-n // kernel.width)
    parts = min(-(-b.chunks // (n_batches * panels)), -(-m // _LEAST_ROWS))
    span = -(-m // parts)
    steps = (m * k if batches[0] > 1 else 0, k * n if batches[1] > 1 else 0)
    sizes = (Scratch(scratch), m, k, n, panels, span)
    args: list[Arg] = [y.address, x.address, steps[0], w.address, steps[1], *sizes]
    flops = 2 * n_batches * m * k * n
    detail = f"{n_batches} x {m} x {k} x {n}"
    items = n_batches * panels * -(-m // span)
    b.step(kernel, args, items, [node], flops=flops, dense_flops=flops, detail=detail)
