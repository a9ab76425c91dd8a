"""Every node test of ONNX, compiled and run: how its outputs compare with what ONNX says.

    python -m benchmarks.conformance [--constants] [--on armv7] [--only reduce resize] [--json FILE]

`--constants` makes constants of all inputs but the first: in models axes, shapes, weights are.
`--on` runs bundles for another machine under its emulator; nodes that would be left to ONNX Runtime
are declined there. A result that differs from ONNX's is unequal unless ONNX Runtime gives it too.
1,884 tests take a quarter of an hour.

Exit codes: 0 nothing is unequal and nothing crashed, 1 something did, 2 wrong usage.
"""

import argparse
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from sparsegraph.targets.target import Target

from benchmarks import bundles
from sparsegraph import targets, verify
from sparsegraph.compile import Compiled, compile
from sparsegraph.errors import SparsegraphError, UnsupportedError

NATIVE, LEFT, DECLINED, SKIPPED = "native", "onnxruntime", "declined", "skipped"
UNEQUAL, CRASHED = "unequal", "crashed"
_IR_VERSION = 10  # from 4 on constants need not be inputs
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4  # ONNX's own tests allow 1e-3


@dataclass(frozen=True)
class Outcome:
    """What became of one test: who computes it, or `unequal`, `crashed`, `declined` and why."""

    test: str
    kind: str
    note: str = ""


def attempt(case: Any, *, constants: bool = False, target: Target | None = None) -> Outcome:
    """Compile one of ONNX's test cases and run it on its first data set.

    Here, with ONNX Runtime for what is not native, or all native in a bundle for `target`.
    """
    given, wanted = case.data_sets[0]
    arrays = [_array(value) for value in (*given, *wanted)]
    if not all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays):
        return Outcome(case.name, SKIPPED, "sequences, texts or types that NumPy lacks")
    feeds = dict(zip((v.name for v in case.model.graph.input), arrays))
    model, feeds = _with_constants(case.model, feeds) if constants else (case.model, feeds)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled, found = _run(model, feeds, target, Path(folder, "m.sg"))
        except SparsegraphError as error:
            return Outcome(case.name, DECLINED, str(error))
        except Exception:
            return Outcome(case.name, CRASHED, traceback.format_exc(limit=-2))
    native = any(s.kind == "native" for s in compiled.manifest.segments)
    outcome = Outcome(case.name, NATIVE if native else LEFT)
    if not native or is_equal(found, arrays[len(given) :]):
        return outcome
    return outcome if _agrees(model, feeds, found) else Outcome(case.name, UNEQUAL)


def _run(
    model: onnx.ModelProto, feeds: verify.Feed, target: Target | None, path: Path
) -> tuple[Compiled, list[np.ndarray]]:
    """The compiled model and its outputs."""
    if target is None:
        compiled = compile(model, output=path, keep_native=True, check=False)
        return compiled, compiled.run(None, feeds)
    compiled = compile(model, target, output=path, check=False, fallback=False)
    files = bundles.run(compiled, feeds, *bundles.command(target, path))
    return compiled, bundles.read(compiled, files)


def is_equal(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> bool:
    """True if types, shapes and values agree; floats within the tolerance of ONNX's tests."""
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=a.dtype.kind == "f")
        for a, b in zip(found, wanted)
    )


def _agrees(model: onnx.ModelProto, feeds: verify.Feed, found: Sequence[np.ndarray]) -> bool:
    """True if ONNX Runtime computes the same."""
    try:
        outputs = verify.Session(model).run(feeds)
    except SparsegraphError:
        return False
    return is_equal(found, list(outputs.values()))


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _with_constants(
    model: onnx.ModelProto, feeds: verify.Feed
) -> tuple[onnx.ModelProto, verify.Feed]:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.ir_version = max(changed.ir_version, _IR_VERSION)
    for value in list(changed.graph.input)[1:]:
        if value.name in feeds:
            tensor = numpy_helper.from_array(feeds[value.name], value.name)
            changed.graph.initializer.append(tensor)
            changed.graph.input.remove(value)
    return changed, {v.name: feeds[v.name] for v in changed.graph.input}


def cases(only: Sequence[str] = ()) -> Iterator[Any]:
    """ONNX's test cases with a model, by name; those whose name holds one of `only`."""
    found = sorted(collect_testcases(None), key=lambda case: str(case.name))
    for case in found:
        if case.model is not None and (not only or any(word in case.name for word in only)):
            yield case


def main(arguments: list[str] | None = None) -> int:
    """Parse, try, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance")
    parser.add_argument("--constants", action="store_true", help="but the first input")
    parser.add_argument("--on", metavar="TARGET", help="run bundles for this machine")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in names of tests")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    options = parser.parse_args(arguments)
    try:
        target = targets.get(options.on) if options.on else None
    except UnsupportedError as error:
        parser.error(str(error))
    chosen = list(cases(options.only))
    if not chosen:
        parser.error(f"no test is called {' or '.join(options.only)}")
    outcomes = []
    for n, case in enumerate(chosen, 1):
        outcomes.append(attempt(case, constants=options.constants, target=target))
        print(f"\r{n} of {len(chosen)}", end="", file=sys.stderr, flush=True)
        if outcomes[-1].kind in (UNEQUAL, CRASHED):
            print(f"\n{outcomes[-1].test}: {outcomes[-1].kind} {outcomes[-1].note}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    counts = Counter(o.kind for o in outcomes)
    print("\n" + ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    return 1 if counts[UNEQUAL] or counts[CRASHED] else 0


if __name__ == "__main__":
    sys.exit(main())
