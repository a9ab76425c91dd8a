"""Time of the `coded` product kernel per non-zero value, relative to ONNX Runtime's dense MatMul.

    python -m benchmarks.product_cost

The figures of `sparsegraph.lower.choose` are the medians over the shapes of what this prints.
Kernels alone: blocks as the plan chooses them, layouts in place, one pinned thread, interleaved.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from sparsegraph.targets import host
from sparsegraph.targets.kernels.product import Product
from sparsegraph.targets.layout import blocked

from sparsegraph import formats, targets
from sparsegraph.lower.choose import choose

SHAPES = ((384, 768, 3072), (384, 768, 768), (128, 384, 1536), (196, 1024, 256), (49, 1024, 512))
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
GROUPS = (1, 4)  # rows that share their zeros
ROUNDS = 5
SECONDS = 0.015


def sparse(rows: int, columns: int, density: float, group: int) -> np.ndarray:
    """Random weights; the zeros of `group` consecutive rows are the same."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    kept = np.repeat(rng.random((-(-rows // group), columns)) < density, group, axis=0)
    return weight * kept[:rows]


def coded(points: int, weight: np.ndarray, density: float, group: int) -> Callable[[], Any]:
    """The kernel on `points` points, ready to call."""
    target = targets.native()
    rows, columns = weight.shape
    xl, yl = (blocked(1, n, points, 1, target) for n in (columns, rows))
    # 0.6: the coded kernel also where the plan would take the dense one
    choice = choose(
        min(density, 0.6), yl.block // target.lanes, columns, target,
        row=xl.row, is_shared=group > 1,
    )  # fmt: skip
    kernel = Product("coded", choice.group, choice.split, target.lanes)
    packed = formats.pack_coded(weight, choice.group, choice.tile, reach=choice.tile // 2)
    x = host.empty(xl.size + 64)
    x[:] = np.random.default_rng(1).standard_normal(x.size)
    y, bias = host.empty(yl.size + 64), host.empty(rows)
    arrays = (packed.values, packed.slots, packed.chunks, packed.column_index, packed.runs)
    args = [
        y, yl.image, yl.tile, yl.row, x, xl.image, xl.tile, xl.row, 1, yl.tiles, columns,
        choice.tile, bias, *map(host.aligned, arrays),
    ]  # fmt: skip
    library = host.Library([kernel], target)
    return partial(_call, library.bind(kernel, *args, begin=0, end=yl.tiles), library, args)


def _call(function: Callable[[], Any], *memory: object) -> None:
    """Call `function`; `memory` is what it works on and must live as long."""
    function()


def dense(points: int, weight: np.ndarray) -> Callable[[], Any]:
    """ONNX Runtime's MatMul of the same size."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [points, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [points, rows])],
        [helper.make_tensor("w", TensorProto.FLOAT, [columns, rows], weight.T.tobytes(), raw=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).standard_normal((points, columns)).astype(np.float32)
    return lambda: session.run(None, {"x": x})


def medians(calls: list[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, in interleaved blocks."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, times in zip(calls, samples):
            call()
            start = time.perf_counter()
            while time.perf_counter() - start < SECONDS:
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
    return [float(np.median(t)) for t in samples]


def main() -> None:
    """Print one line per density, a column per shape and the median."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for group in GROUPS:
        print(f"zeros shared by {group} rows: " + "  ".join("x".join(map(str, s)) for s in SHAPES))
        table = []
        for points, columns, rows in SHAPES:
            weights = [sparse(rows, columns, d, group) for d in DENSITIES]
            calls = [dense(points, weights[0])]
            calls += [coded(points, w, d, group) for w, d in zip(weights, DENSITIES)]
            ort, *ours = medians(calls)
            table.append([s / ort / d for s, d in zip(ours, DENSITIES)])
        for density, line in zip(DENSITIES, np.array(table).T):
            cells = "  ".join(f"{v:5.2f}" for v in line)
            print(f"{density:5.2f}  {cells}  median {np.median(line):.2f}", flush=True)


if __name__ == "__main__":
    main()
