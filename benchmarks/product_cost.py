"""Measure products with constant weights, fit the cost model, and say how wrong it is.

    python -m benchmarks.product_cost                 measure what is missing, fit, write the prices
    python -m benchmarks.product_cost --seconds 40    stop measuring after 40 s; go on the next time
    python -m benchmarks.product_cost --afresh        forget earlier measurements (other kernels)
    python -m benchmarks.product_cost --again         measure all once more, keep the shorter times
    python -m benchmarks.product_cost --no-measure    fit and report what is stored

Layers are those of `benchmarks.product_grid`; kernels and layouts are those of lowering, one pinned
thread, medians, candidates and ONNX Runtime's single-node model taking turns. The error is that of
layers the fit has not seen: layers (shapes, not densities) are dealt into `FOLDS` parts, and every
part is predicted by a fit to the others.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls
from sparsegraph.targets.target import Target

from benchmarks import product_grid, results
from sparsegraph import output, targets
from sparsegraph.lower import cost, problem, trial
from sparsegraph.lower.problem import Choice, Problem
from sparsegraph.lower.windows import Filter

FOLDS = 5
ROUNDS, BLOCK_MS = 5, 4.0
BAR = 0.15  # median absolute relative error on layers that the fit never saw
NOISE_NS = 1000.0  # errors are relative to the time and this much: short calls weigh less
ORT = "onnxruntime"
_CALLS = ("winograd_input", "dense", "winograd_output")  # of Winograd's method, in their order

Record = dict[str, Any]


def measure_layer(
    layer: product_grid.Layer, kernels: trial.Kernels, target: Target
) -> Iterator[Record]:
    """One record per way to compute the layer at each density, and one of ONNX Runtime."""
    for density, operands, choices in product_grid.cases(layer, target):
        programs = [trial.lower(operands, c, target) for c in choices]
        others = [reference(layer, operands.weight), idle()] if density == 1 else []
        times = kernels.time(programs, *others, rounds=ROUNDS, block_ms=BLOCK_MS)
        head = {"layer": layer.name, "problem": dataclasses.asdict(problem.of(operands, target))}
        for choice, ms in zip(choices, times):
            way = {name: getattr(choice, name) for name in ("weight", "group", "split", "tile")}
            n = len(_CALLS) if choice.patch else 1
            calls = [round(sum(ms[i::n]), 6) for i in range(n)]  # of all strips of a map
            yield {**head, "choice": way, "ms": calls}
        if others:
            (ours,), (empty,) = times[-2:]
            yield {**head, "choice": None, "ms": [round(max(ours - empty, 1e-6), 6)]}


def idle() -> trial.Call:
    """ONNX Runtime on next to nothing: what a call of a session takes by itself."""
    node = helper.make_node("Relu", ["x"], ["y"])
    return _session(node, [1], {})


def reference(layer: product_grid.Layer, weight: np.ndarray) -> trial.Call:
    """ONNX Runtime on a model of this layer alone, one thread."""
    window, points = layer.window(), layer.height * layer.width
    if window is None:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        shape, weight = [points, layer.channels], np.ascontiguousarray(weight.T)
    else:
        pads, strides = list(window.pads), list(window.stride)
        node = helper.make_node("Conv", ["x", "w"], ["y"], pads=pads, strides=strides)
        shape = [1, layer.channels, layer.height, layer.width]
    return _session(node, shape, {"w": weight})


def _session(node: Any, shape: list[int], weights: dict[str, np.ndarray]) -> trial.Call:
    graph = helper.make_graph(
        [node], "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    return partial(session.run, None, {"x": x})


def shorter(earlier: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """Of records of the same case the one that took less time, in the order of the first."""
    found: dict[str, Record] = {}
    for record in (*earlier, *records):
        case = json.dumps([record[name] for name in ("layer", "problem", "choice")])
        known = found.setdefault(case, record)
        if sum(record["ms"]) < sum(known["ms"]):
            found[case] = record
    return list(found.values())


def samples(records: Sequence[Record], target: Target) -> dict[str, list[tuple[str, Any, float]]]:
    """kernel -> (layer, counts, nanoseconds) of each call."""
    found: dict[str, list[tuple[str, Any, float]]] = {}
    for record in records:
        case, choice = _problem(record), _choice(record)
        if choice is None:
            parts = [cost.reference_counts(case, target)]
        else:
            parts = sorted(cost.counts(case, choice, target), key=_call_order)
        for (kernel, n), ms in zip(parts, record["ms"], strict=True):
            found.setdefault(kernel, []).append((record["layer"], n, ms * 1e6))
    return found


def _call_order(part: tuple[str, Any]) -> int:
    return _CALLS.index(part[0]) if part[0] in _CALLS else 0


def fit(records: Sequence[Record], target: Target, start: cost.Prices | None = None) -> cost.Prices:
    """Prices by non-negative least squares on relative error, per kernel."""
    prices = dict(start or {})
    for kernel, rows in samples(records, target).items():
        names = sorted({name for _, n, _ in rows for name in n})
        scale = [ns + NOISE_NS for _, _, ns in rows]
        counts = [[n.get(name, 0.0) / s for name in names] for (_, n, _), s in zip(rows, scale)]
        found = _robust(np.array(counts), np.array([ns / s for (_, _, ns), s in zip(rows, scale)]))
        prices[kernel] = {n: float(f"{v:.4g}") for n, v in zip(names, found) if v > 0}
    return prices


def _robust(table: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Solve table @ x = want with x >= 0; rows far off count less (Huber weights at 15 %)."""
    weight = np.ones(len(table))
    for _ in range(6):
        found, _ = nnls(table * weight[:, None], want * weight)
        error = np.abs(table @ found - want)
        weight = np.sqrt(np.minimum(1.0, BAR / np.maximum(error, 1e-9)))
    return np.asarray(found)


def held_out(records: Sequence[Record], target: Target) -> list[float]:
    """Per record predicted / measured - 1, by a fit to the layers of the other folds."""
    layers = sorted({r["layer"] for r in records})
    fold = {layer: i % FOLDS for i, layer in enumerate(layers)}
    found = [0.0] * len(records)
    for k in range(FOLDS):
        prices = fit([r for r in records if fold[r["layer"]] != k], target)
        for i, r in enumerate(records):
            if fold[r["layer"]] == k:
                found[i] = predicted(r, prices, target) / sum(r["ms"]) - 1
    return found


def predicted(record: Record, prices: cost.Prices, target: Target) -> float:
    """Milliseconds of a record by the model."""
    case, choice = _problem(record), _choice(record)
    if choice is None:
        return cost.dense_ms(case, target, prices)
    return cost.ours_ms(case, choice, target, prices)


def _problem(record: Record) -> Problem:
    fields = dict(record["problem"])
    fields |= {name: tuple(fields[name]) for name in ("out", "patches")}
    fields.setdefault("single", fields["points"] == 1 and fields["gather"] is None)
    return Problem(**{**fields, "filter": Filter(*fields.get("filter", ()))})


def _choice(record: Record) -> Choice | None:
    fields = record["choice"]
    return None if fields is None else Choice(**{**fields, "split": tuple(fields["split"])})


def family(record: Record) -> str:
    """The row of the table that a record counts in."""
    if record["choice"] is None:
        return ORT
    weight = str(record["choice"]["weight"]).split("-")[0]
    case = record["problem"]
    if weight == "coded" and case["shared"] > 1:
        weight = "coded, shared zeros"
    kind = "" if case["gather"] is None or weight == "winograd" else ", gathered"
    return weight + kind


def table(records: Sequence[Record], errors: Sequence[float]) -> list[dict[str, Any]]:
    """Error by family, all of ours, and ONNX Runtime's."""
    by: dict[str, list[float]] = {}
    for record, error in zip(records, errors):
        name = family(record)
        for key in (name, *(["all of ours"] if name != ORT else [])):
            by.setdefault(key, []).append(abs(error))
    return [
        {
            "family": name,
            "records": len(found),
            "median": round(float(np.median(found)), 4),
            "p90": round(float(np.quantile(found, 0.9)), 4),
            "worst": round(max(found), 4),
        }
        for name, found in sorted(by.items())
    ]


def main() -> None:
    """Measure, fit, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit of this batch")
    parser.add_argument("--afresh", action="store_true", help="forget earlier measurements")
    parser.add_argument("--again", action="store_true", help="measure again; noise only adds")
    parser.add_argument("--no-measure", action="store_true", help="fit what is stored")
    parser.add_argument("--json", type=Path, help="where measurements and errors are kept")
    given = parser.parse_args()
    target = targets.native()
    path = given.json or Path(__file__).parent / "results" / f"product-cost-{target.name}.json"
    data = json.loads(path.read_text()) if path.exists() and not given.afresh else {"records": []}
    if not given.no_measure:
        begun = results.begin(["benchmarks.product_cost"])
        data |= {"commit": begun.commit, "machine": begun.machine, "versions": begun.versions}
        measured = [] if given.again else data["records"]
        _measure(measured, target, given.seconds)
        data["records"] = shorter(data["records"], measured)
    records = data["records"]
    if not records:
        parser.error(f"{path} holds no measurements")
    data["held_out"] = table(records, held_out(records, target))
    output.write_text(path, _text(data))
    for row in data["held_out"]:
        print(
            f"{row['family']:32} {row['records']:4} records  median {row['median']:.1%}  "
            f"p90 {row['p90']:.1%}  worst {row['worst']:.0%}"
        )
    missing = len(product_grid.LAYERS) - len({r["layer"] for r in records})
    if missing:
        print(f"{missing} layers are still to be measured; prices are unchanged")
        return
    cost.save(target.name, {"prices": fit(records, target)})
    print(f"wrote prices of {target.name}")


def _text(data: dict[str, Any]) -> str:
    """JSON with a record per line."""
    rest = json.dumps({k: v for k, v in data.items() if k != "records"}, indent=1)
    lines = ",\n  ".join(json.dumps(record) for record in data["records"])
    return f'{rest[:-2]},\n "records": [\n  {lines}\n ]\n}}\n'


def _measure(records: list[Record], target: Target, seconds: float) -> None:
    """Append the records of layers that have none, until the time is up."""
    end = time.monotonic() + seconds
    kernels = trial.Kernels(target)
    known = {r["layer"] for r in records}
    for layer in product_grid.LAYERS:
        if layer.name not in known and time.monotonic() < end:
            records += list(measure_layer(layer, kernels, target))
            print(layer.name, flush=True)


if __name__ == "__main__":
    main()
