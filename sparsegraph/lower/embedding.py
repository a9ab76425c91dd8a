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
    n_kept, n_values = (int(np.count_nonzero(x)) for x in (flat.any(axis=1), flat))
    n_bytes = 4 * (n_kept * flat.shape[1] + len(flat))  # as `keep_rows` and `pack` make them
    coded_bytes = 6 * n_values + 4 * (len(flat) + 1)
    can_code = flat.shape[1] <= embedding.MOST_COLUMNS
    is_coded = can_code and coded_bytes <= _HALF * table.nbytes and coded_bytes < n_bytes
    if not is_coded and n_bytes > _MOST * table.nbytes:
        return False
    if is_coded:
        streams = compressed_rows.pack(flat, np.uint16)._asdict()
    else:
        streams = embedding.keep_rows(flat)._asdict()
    to = b.new_row(node.outputs[0])
    args: list[Arg] = [to.address]
    args += [b.weight(f"{node.name}.{name}", array) for name, array in streams.items()]
    args += [indices.address, flat.shape[1], len(table)]
    share = n_values / flat.size
    detail = f"{indices.size} rows of a table, {share:.1%} non-zero"
    b.step(Embedding(indices.dtype, is_coded), args, indices.size, [node], detail=detail)
    return True
