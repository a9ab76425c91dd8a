"""Product kernels as PTX: generated without a toolkit, assembled where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sparsegraph.targets import emit, inner_loop
from sparsegraph.targets.kernel import prim_func
from sparsegraph.targets.kernels.product import Product

from sparsegraph import targets
from sparsegraph.compile import compile
from sparsegraph.errors import UnsupportedError

A0 = ("arg", 0)
RESIDUAL = ("Relu", ("Add", A0, ("arg", 1)))
PRODUCTS = {  # kernel: multiply-adds and loads of a round of the inner loop
    Product("dense", 4, (4,), 1): (16, 8),
    Product("dense", 4, (4,), 1, None, ("Gelu", A0)): (16, 8),
    Product("dense", 4, (4,), 1, None, RESIDUAL, ("same",)): (16, 8),
    Product("coded", 2, (4,), 1, near=True): (32, 25),
    Product("coded", 2, (8,), 1, near=True): (64, 41),
    Product("coded", 2, (4,), 1, None, RESIDUAL, ("same",), near=True): (32, 25),
}


def ptx(kernel: Product, name: str) -> str:
    target = targets.get(name)
    return str(emit.assembly({kernel.name: prim_func(kernel, target)}, target))


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", PRODUCTS, ids=lambda k: k.name)
def test_ptx_of_products(kernel: Product, name: str) -> None:
    text = ptx(kernel, name)
    assert re.search(rf"^\.visible \.entry {kernel.name}\(", text, re.MULTILINE)
    assert f".target {name}" in text
    assert not re.search(r"\.local|__local_depot|\bcall\b|\.extern", text)
    loop = inner_loop.look(targets.get(name), kernel)
    n_fused, n_loads = PRODUCTS[kernel]
    assert loop.fused % n_fused == 0  # LLVM may unroll
    assert loop.loads / loop.fused <= n_loads / n_fused
    assert loop.products == loop.spills == 0


def test_a_thread_computes_its_own_item() -> None:
    kernel = Product("dense", 4, (4,), 1)
    text = ptx(kernel, "sm_80")
    for register in ("%tid.x", "%ctaid.x", "%ntid.x"):
        assert text.count(register) == 1
    body = text[text.index("{") :]
    begin, end = (f"_param_{len(kernel.params) + i}]" for i in range(2))
    assert begin in body
    assert end in body  # threads past the last item do nothing
    assert "st.global" not in body[: body.index(end)]


def test_entries_of_one_module_keep_their_names() -> None:
    target = targets.get("sm_90")
    kernels = {k.name: prim_func(k, target) for k in list(PRODUCTS)[:2]}
    text = emit.assembly(kernels, target)
    assert re.findall(r"\.entry (\w+)\(", text) == list(kernels)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_ptx_is_assembled(name: str, tmp_path: Path) -> None:
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("needs ptxas (pip: nvidia-cuda-nvcc-cu12)")
    for kernel in PRODUCTS:
        (tmp_path / "k.ptx").write_text(ptx(kernel, name))
        command = [assembler, f"-arch={name}", "-v", "k.ptx", "-o", "k.cubin"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
        assert (tmp_path / "k.cubin").stat().st_size > 1000


def test_whole_models_are_refused(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="target 'sm_80': found kernels that nothing"):
        compile(model_file, "sm_80", shapes={"batch": 4}, output=tmp_path / "m.sg")
    assert list(tmp_path.iterdir()) == []
