"""Masks of Attention that ONNX broadcasts and ONNX Runtime does not."""

from collections import Counter

import numpy as np
import onnx
import pytest
from sparsegraph.targets.kernels.attention import reference

from sparsegraph.capture import load
from sparsegraph.compile import compile
from sparsegraph.verify import compare, run_onnx

BATCH, HEADS, QUERIES, KEYS, DEPTH = 2, 3, 5, 7, 4
MASKS = [  # shape, and Expand in front of Attention
    ((BATCH, 1, 1, KEYS), 1), ((BATCH, HEADS, 1, KEYS), 1), ((1, 1, QUERIES, 1), 1),
    ((1, KEYS), 1), ((QUERIES, 1), 1), ((QUERIES, KEYS), 0), ((1, HEADS, QUERIES, KEYS), 0),
]  # fmt: skip


def network(mask: tuple[int, ...], dtype: str) -> onnx.ModelProto:
    sizes = {"q": QUERIES, "k": KEYS, "v": KEYS}
    inputs = ", ".join(f"float[{BATCH}, {HEADS}, {n}, {DEPTH}] {p}" for p, n in sizes.items())
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    g ({inputs}, {dtype}[{", ".join(map(str, mask))}] m)
        => (float[{BATCH}, {HEADS}, {QUERIES}, {DEPTH}] y) {{ y = Attention(q, k, v, m) }}"""
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize("dtype", ["float", "bool"])
@pytest.mark.parametrize(("shape", "n_expanded"), MASKS, ids=str)
def test_every_mask_is_run_here_and_there(
    shape: tuple[int, ...], n_expanded: int, dtype: str
) -> None:
    model = load(network(shape, dtype))
    assert Counter(n.op_type for n in model.graph)["Expand"] == n_expanded
    rng = np.random.default_rng(4)
    lengths = {"q": QUERIES, "k": KEYS, "v": KEYS}
    feed = {p: rng.standard_normal((BATCH, HEADS, n, DEPTH)).astype(np.float32)
            for p, n in lengths.items()}  # fmt: skip
    kept = rng.random(shape) < 0.7
    kept[..., 0] = True
    feed["m"] = kept if dtype == "bool" else rng.standard_normal(shape).astype(np.float32)
    added = np.where(kept, 0, -np.inf) if dtype == "bool" else feed["m"]
    full = np.broadcast_to(added, (BATCH, HEADS, QUERIES, KEYS))
    scale = 1 / np.sqrt(DEPTH)
    heads = [reference(*(feed[p][i] for p in "qkv"), scale, full[i]) for i in range(BATCH)]
    want = {"y": np.stack(heads).astype(np.float32)}
    assert compare(run_onnx(model, feed), want) <= 1e-6
    compiled = compile(model, check=False, keep_native=True, fallback=False)
    (y,) = compiled.session.run(None, feed)
    assert compare({"y": y}, want) <= 1e-6


def test_keys_of_padding_in_a_torch_encoder() -> None:
    torch = pytest.importorskip("torch", reason="torch")
    from sparsegraph.capture import capture

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(24, 3, 48, batch_first=True).eval()
    x, padding = torch.randn(1, 9, 24), torch.zeros(1, 9, dtype=torch.bool)
    padding[0, 6:] = True

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: object, padding: object) -> object:
            return self.layer(x, src_key_padding_mask=padding)

    model = capture(Net(), (x, padding))
    compiled = compile(model, check=False, keep_native=True, fallback=False)
    names = [i.name for i in compiled.session.get_inputs()]
    (y,) = compiled.session.run(None, dict(zip(names, (x.numpy(), padding.numpy()))))
    with torch.no_grad():
        want = Net()(x, padding).numpy()
    assert compare({"y": y}, {"y": want}) <= 1e-5
