"""The package: quick to import, nothing heavy, names that work in every order of imports."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import sparsegraph as sg
from tests.conftest import BATCH, INPUTS, perceptron

HEAVY = ("torch", "tvm", "onnxruntime", "onnx", "onnx_ir", "numpy", "scipy", "rich", "typer")


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_is_installed() -> None:
    """Tests import the checkout, so that a package missing from the list would go unseen."""
    root = Path(__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for top in ("sparsegraph", "passes", "targets")
        for path in (root / top).rglob("*.py")
    }
    found = {name if name.startswith("sparsegraph") else f"sparsegraph.{name}" for name in found}
    assert sorted(listed) == sorted(found)


def test_import_brings_nothing_heavy() -> None:
    code = f"import sys, sparsegraph; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


def test_import_takes_less_than_300_ms() -> None:
    code = "import time; t = time.perf_counter(); import sparsegraph; print(time.perf_counter()-t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_works_without_torch() -> None:
    blocked = "import sys; sys.modules['torch'] = None\n"
    code = "import sparsegraph as sg; sg.load, sg.optimize, sg.compile.compile, sg.inspect.inspect"
    python(blocked + code)


@pytest.mark.parametrize("name", sg.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert name in dir(sg)
    value = getattr(sg, name)
    assert name == "errors" or callable(value)


@pytest.mark.parametrize("verb", ["bench", "capture", "compile", "inspect", "prune", "shrink"])
def test_verbs_work_before_and_after_their_module_is_imported(verb: str) -> None:
    code = f"""
import sparsegraph as sg
first = sg.{verb}
import sparsegraph.{verb}
from sparsegraph.{verb} import {verb} as function
assert sg.{verb} is first and callable(first) and first.{verb} is function
from sparsegraph import {verb}
assert {verb} is first
"""
    python(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="colour"):
        _ = sg.colour  # type: ignore[attr-defined]


def test_the_readme_example() -> None:
    model = sg.load(perceptron(), {"batch": BATCH})
    pruned = sg.prune(model, "magnitude:0.9")
    compiled = sg.compile(pruned, target="native")
    x = np.random.default_rng(0).standard_normal((BATCH, INPUTS)).astype(np.float32)
    (again,) = sg.InferenceSession(compiled.path).run(None, {"x": x})
    assert np.array_equal(compiled(x), again)
    report = compiled.report()
    assert "up" in report
    assert "coded" in report
    assert sg.inspect(model).n_faster == 1


def test_commands_start_quickly() -> None:
    start = time.perf_counter()
    python("import sys; from sparsegraph import cli; assert 'tvm' not in sys.modules")
    assert time.perf_counter() - start < 10
