"""A manifest in words: what became of each layer, what ONNX Runtime runs, how it was proven."""

from collections.abc import Mapping
from typing import Any

from sparsegraph import targets
from sparsegraph.lower import cost

COLUMNS = (
    "layer", "op", "weight", "density", "format", "ms", "from", "speedup", "why not sparse",
)  # fmt: skip
Manifest = Mapping[str, Any]


def layers(manifest: Manifest) -> list[list[Any]]:
    """One row per layer of the plan, then those of `left`."""
    predicted = prediction(manifest["target"]["text"])
    rows = [
        [
            layer["node"],
            layer["op"],
            "x".join(map(str, layer["weight"])),
            layer["density"],
            layer["format"],
            layer["ms"],
            "measured" if layer["is_measured"] else predicted,
            1 / max(layer["estimate"], 1e-3),
            why_dense(layer),
        ]
        for layer in manifest["layers"]
    ]
    for node, reason in left(manifest):
        rows.append([node, "", "", None, "onnxruntime", None, "", None, reason])
    return rows


def prediction(target: str) -> str:
    """What times of the cost model are called: by prices measured on such a machine, or not."""
    return "estimated" if cost.basis(targets.codes(target)[0]) else "predicted"


def fallbacks(manifest: Manifest) -> list[tuple[str, str]]:
    """(node, reason) of everything that ONNX Runtime runs."""
    segments = [s for s in manifest["segments"] if s["kind"] != "native"]
    return [(node, s["reason"]) for s in segments for node in s["nodes"]]


def left(manifest: Manifest) -> list[tuple[str, str]]:
    """Rows of `fallbacks`; a model that was left as a whole has one for all of its nodes."""
    rows = fallbacks(manifest)
    if len(manifest["segments"]) == 1 and len(rows) > 1:
        return [(f"all {len(rows)} nodes", rows[0][1])]
    return rows


def why_dense(layer: Mapping[str, Any]) -> str:
    """Why a layer of the plan is dense, and how; empty if it is not."""
    fast = [part for part in layer["format"].split("+") if part.startswith("winograd-")]
    if not fast and layer["format"] != "dense":
        return ""
    reason = f"density {layer['density']:.2f} is above break-even {layer['break_even']:.2f}"
    if layer["density"] == 1:
        reason = "no zeros"
    for part in fast:
        m, _, taps = part.removeprefix("winograd-").partition(",")
        size = f"weights {(int(m) + 2) ** 2 / 9:.1f} times as large"
        reason += f"; Winograd F({m},{taps or 3}), "
        reason += "even and odd rows and columns apart" if taps else size
    return reason


def proof(manifest: Manifest) -> str:
    """The verification record in words."""
    record = manifest["verification"]
    if not record.get("checked"):
        return "outputs not checked"
    error, n = record["max_rel_error"], record["feeds"]
    return f"outputs within {error:.1e} of ONNX Runtime on {n} feeds"


def weight_bytes(manifest: Manifest) -> int:
    """Size of the weight file."""
    return int(manifest["members"]["weights.bin"]["n_bytes"])


def summary(manifest: Manifest) -> str:
    """One line: size, kernels, fallback nodes, proof."""
    native = [s for s in manifest["segments"] if s["kind"] == "native"]
    kernels = {step["kernel"] for segment in native for step in segment["steps"]}
    return (
        f"{weight_bytes(manifest) / 1e6:.2f} MB of weights, {len(kernels)} kernels, "
        f"{len(fallbacks(manifest))} nodes in ONNX Runtime, {proof(manifest)}{_footprint(manifest)}"
        f"{_basis(manifest)}"
    )


def _basis(manifest: Manifest) -> str:
    """Where estimated times come from."""
    found = cost.basis(targets.codes(manifest["target"]["text"])[0])
    if not found or all(layer["is_measured"] for layer in manifest["layers"]):
        return ""
    return f"; times estimated: {found}"


def _footprint(manifest: Manifest) -> str:
    """What a microcontroller has to have, start-up code and stack left out."""
    found = manifest.get("footprint")
    if not found:
        return ""
    flash, ram = found["flash_bytes"] / 1e3, found["ram_bytes"] / 1e3
    return f"; {flash:.1f} kB of flash, {ram:.1f} kB of RAM"


def text(manifest: Manifest) -> str:
    """The table and the summary as plain text, columns lined up."""
    cells = [list(COLUMNS), *[[_cell(value) for value in row] for row in layers(manifest)]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, summary(manifest)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
