"""C11 source: builds without a warning, runs clean under sanitizers, equals ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest
from sparsegraph.targets import c_source
from sparsegraph.targets.kernels.product import Product

from benchmarks import bundles
from sparsegraph import targets
from sparsegraph.compile import compile
from tests.passes.check import parse
from tests.targets import cross

SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "density", "compiler", "flags"),
    [
        ("digits_cnn", 1.0, "gcc", SANITIZE),
        ("digits_cnn", 0.1, "gcc", SANITIZE),
        ("minilm", 0.1, "gcc", SANITIZE),
        ("mobilenet_v1", 0.1, "gcc", ()),
        ("digits_cnn", 0.1, "clang", ()),
        ("resnet18", 0.1, "clang", ()),
    ],
)
def test_models_equal_onnx_runtime(
    model: str, density: float, compiler: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    cross.require(compiler)
    case = cross.Case(model, density)
    compiled = case.compile(targets.get("c11"), tmp_path / "m.sg")
    program = cross.build_source(compiled.path, compiler, *flags)
    case.check(compiled, program, compiled.path / "weights.bin", 1)


def test_array_holds_the_weights(tmp_path: Path) -> None:
    cross.require("gcc")
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8).tobytes()
    main = """#include <stdint.h>
        #include <stdio.h>
        extern const unsigned char w[];
        int main(void)
        {
            fwrite(w, 1, 1000, stdout);
            return (uintptr_t)w % 64 != 0;
        }"""
    (tmp_path / "w.c").write_text(c_source.array_text("w", data))
    (tmp_path / "main.c").write_text(main)
    program = cross.build_source(tmp_path, "gcc")
    out = tmp_path / "out"
    done = cross.execute("sh", "-c", f"{program} > {out}")
    assert done.returncode == 0
    assert out.read_bytes() == data


BYTES = """g ({0}[9] x, {0}[9] d)
=> ({0}[9] c, {0}[9] e, {0}[9] s, {0}[9] m, bool[9] l, {0}[9] q) {{
    c = Clip(x, low, high)  e = Clip(x, two, high)  s = Sign(x)  m = Max(x, low)
    l = Less(x, low)  q = Div(x, d) }}"""


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_what_is_always_true_of_bytes(kind: str, tmp_path: Path) -> None:
    cross.require("gcc")
    info = np.iinfo(kind)
    numbers = {"low": info.min, "high": info.max, "two": 2}
    model = parse(BYTES.format(kind), **{k: np.array(n, kind) for k, n in numbers.items()})
    path = tmp_path / "m.sg"
    compiled = compile(model, "c11", output=path, check=False, fallback=False)
    x = np.array([info.min, info.min + 1, 0, 1, 2, 3, 99, info.max - 1, info.max], kind)
    command = [cross.build_source(path, "gcc", *SANITIZE), path / "weights.bin", 1]
    files = bundles.run(compiled, {"x": x, "d": np.full(9, 2, kind)}, *command)
    found = bundles.read(compiled, files)
    wide = x.astype(int)
    wanted = [x, np.maximum(x, 2), np.sign(x), x, x < info.min, np.trunc(wide / 2)]
    for own, value in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(own, value)


def test_equal_kernels_give_equal_text() -> None:
    target = targets.get("c11")
    kernels = [Product("coded", 2, (4,), 1), Product("dense", 3, (4,), 1)]
    functions = [c_source.function_text(kernel, target) for kernel in kernels]
    assert functions == [c_source.function_text(kernel, target) for kernel in kernels]
    assert c_source.kernels_text(functions).count("\nvoid ") == 4


def test_vectors_are_refused() -> None:
    with pytest.raises(AssertionError, match="no C for"):
        c_source.function_text(Product("dense", 3, (4,), 4), targets.get("c11"))
