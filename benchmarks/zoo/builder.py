"""A small writer of ONNX models: named weights, one method per layer, no framework.

Weights are normal with standard deviation gain / sqrt(fan-in), so that activations keep a second
moment of about one through any depth (He et al. 2015, "Delving Deep into Rectifiers", section 2.2).
Each tensor has its own generator, seeded by its name: adding a layer never changes the others.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
"""The newest opset that every peer reads (DeepSparse 1.8 stops there)."""

IR_VERSION = 8
RELU_GAIN = math.sqrt(2.0)


class Builder:
    """Collects nodes and initializers of one graph; values are passed around by their names."""

    def __init__(self, name: str, *, seed: int = 0, opset: int = OPSET) -> None:
        self.name = name
        self.seed = seed
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._counts: dict[str, int] = {}

    def input(self, name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str) -> None:
        """Declare `value` as graph output `name` (the producing node is renamed)."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if v == value else v for v in names]
        self._outputs.append(helper.make_empty_tensor_value_info(name))

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return that value."""
        return self.op_n(1, op_type, *inputs, **attributes)[0]

    def op_n(self, n_outputs: int, op_type: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with `n_outputs` outputs and return them."""
        number = self._counts.get(op_type, 0)
        self._counts[op_type] = number + 1
        node_name = f"{op_type}_{number}"
        outputs = [f"{node_name}_output_{i}" for i in range(n_outputs)]
        self._nodes.append(
            helper.make_node(op_type, list(inputs), outputs, name=node_name, **attributes)
        )
        return outputs

    def weight(self, name: str, array: NDArray[np.float32]) -> str:
        """Add an initializer under the name that a checkpoint gives it."""
        if name in self._initializers:
            raise ValueError(f"initializer '{name}' exists already")
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def normal(self, name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> str:
        """Add a normally distributed initializer."""
        noise = self._rng(name).standard_normal(tuple(shape), dtype=np.float32)
        return self.weight(name, noise * np.float32(std) + np.float32(mean))

    def uniform(self, name: str, shape: Sequence[int], low: float, high: float) -> str:
        """Add a uniformly distributed initializer."""
        values = self._rng(name).uniform(low, high, tuple(shape))
        return self.weight(name, values.astype(np.float32))

    def constant(self, values: object, dtype: type = np.float32) -> str:
        """Add a Constant node, as exporters do for what is not a parameter."""
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(values, dtype)))

    def ints(self, *values: int) -> str:
        """Add a 1-D int64 Constant: shapes, axes, starts."""
        return self.constant(values, np.int64)

    def conv(
        self,
        x: str,
        name: str,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        gain: float = RELU_GAIN,
        pads: Sequence[int] | None = None,
    ) -> str:
        """Convolution of an NCHW map; padded to `same` for stride 1 unless `pads` is given."""
        fan_in = c_in // groups * kernel * kernel
        shape = (c_out, c_in // groups, kernel, kernel)
        inputs = [x, self.normal(f"{name}.weight", shape, gain / math.sqrt(fan_in))]
        if bias:
            inputs.append(self.normal(f"{name}.bias", (c_out,), 0.1))
        return self.op(
            "Conv",
            *inputs,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=list(pads) if pads is not None else [kernel // 2] * 4,
            group=groups,
            dilations=[1, 1],
        )

    def batch_norm(self, x: str, name: str, channels: int, *, gain: float = 1.0) -> str:
        """Inference batch normalisation; `gain` scales the branch that ends here."""
        return self.op(
            "BatchNormalization",
            x,
            self.uniform(f"{name}.weight", (channels,), 0.8 * gain, 1.2 * gain),
            self.normal(f"{name}.bias", (channels,), 0.1),
            self.normal(f"{name}.running_mean", (channels,), 0.1),
            self.uniform(f"{name}.running_var", (channels,), 0.8, 1.2),
            epsilon=1e-5,
        )

    def layer_norm(self, x: str, name: str, features: int, *, epsilon: float) -> str:
        """Layer normalisation over the last axis."""
        return self.op(
            "LayerNormalization",
            x,
            self.uniform(f"{name}.weight", (features,), 0.8, 1.2),
            self.normal(f"{name}.bias", (features,), 0.1),
            axis=-1,
            epsilon=epsilon,
        )

    def linear(self, x: str, name: str, n_in: int, n_out: int, *, gain: float = 1.0) -> str:
        """Linear layer of a 3-D input, as exporters write it: MatMul by [in, out], then Add."""
        weight = self.normal(f"{name}.weight", (n_in, n_out), gain / math.sqrt(n_in))
        bias = self.normal(f"{name}.bias", (n_out,), 0.1)
        return self.op("Add", bias, self.op("MatMul", x, weight))

    def gemm(self, x: str, name: str, n_in: int, n_out: int, *, gain: float = 1.0) -> str:
        """Linear layer of a 2-D input, as exporters write it: Gemm by [out, in]."""
        weight = self.normal(f"{name}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        bias = self.normal(f"{name}.bias", (n_out,), 0.1)
        return self.op("Gemm", x, weight, bias, transB=1)

    def relu(self, x: str) -> str:
        """Rectifier."""
        return self.op("Relu", x)

    def relu6(self, x: str) -> str:
        """Rectifier that ends at 6, which exporters write as Clip."""
        return self.op("Clip", x, self.constant(0.0), self.constant(6.0))

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape with a constant shape."""
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: str, *perm: int) -> str:
        """Transpose."""
        return self.op("Transpose", x, perm=list(perm))

    def gelu(self, x: str) -> str:
        """Exact GELU in the five nodes that torch's exporter gives below opset 20."""
        erf = self.op("Erf", self.op("Div", x, self.constant(math.sqrt(2.0))))
        gated = self.op("Mul", x, self.op("Add", erf, self.constant(1.0)))
        return self.op("Mul", gated, self.constant(0.5))

    def finish(self) -> onnx.ModelProto:
        """The checked model with all shapes inferred."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=IR_VERSION,
            producer_name="sparsegraph-zoo",
        )
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model)
        return model

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])
