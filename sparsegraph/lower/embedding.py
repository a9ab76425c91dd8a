"""Embeddings: rows of a constant table that a pruned model has thinned out."""

import numpy as np
import onnx_ir as ir

from sparsegraph import compressed_rows
from sparsegraph.lower.builder import Builder, Stored
from sparsegraph.program import Arg
from sparsegraph.targets.kernels import embedding
from sparsegraph.targets.kernels.embedding import Embedding

_HALF = 0.5  # of the bytes: clearing and filling a row takes longer than copying it
_MOST = 0.9  # of the bytes where only rows of zeros are left out, which takes no longer


def lower_embedding(b: Builder, node: ir.Node, table: np.ndarray, indices: Stored) -> bool:
    """Gather along the first axis of a float32 table [rows, ...]; False if that saves nothing."""
    flat = table.reshape(len(table), -1)
    if table.dtype != np.float32 or flat.size == 0:
        return False
    kept = embedding.keep_rows(flat)
    streams = [("values", kept.values), ("places", kept.places)]
    is_coded, n_bytes = False, kept.nbytes
    if flat.shape[1] <= embedding.MOST_COLUMNS:
        rows = compressed_rows.pack(flat, np.uint16)
        is_coded = rows.nbytes <= _HALF * table.nbytes and rows.nbytes < n_bytes
        if is_coded:
            streams, n_bytes = list(zip(("values", "columns", "starts"), rows)), rows.nbytes
    if n_bytes > _MOST * table.nbytes:
        return False
    to = b.new_row(node.outputs[0])
    args: list[Arg] = [to.address]
    args += [b.weight(f"{node.name}.{name}", array) for name, array in streams]
    args += [indices.address, flat.shape[1], len(table)]
    share = np.count_nonzero(flat) / flat.size
    detail = f"{indices.size} rows of a table, {share:.1%} non-zero"
    b.step(Embedding(indices.dtype, is_coded), args, indices.size, [node], detail=detail)
    return True
