"""Topologies that ship with onnx without weights; here with random ones.

They are real exports of 2017: weights as graph inputs, Unsqueeze and Reshape on weights, LRN, Sum.
"""

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

FOLDER = Path(onnx.__file__).parent / "backend/test/data/light"
NAMES = (
    "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19",
)  # fmt: skip


def light(name: str, seed: int = 0) -> onnx.ModelProto:
    """The topology of this name with seeded weights in the place of its ConstantOfShape nodes."""
    proto = onnx.load(FOLDER / f"light_{name}.onnx")
    rng = np.random.default_rng(seed)
    shapes = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in [n for n in proto.graph.node if n.op_type == "ConstantOfShape"]:
        array = _weight(tuple(shapes[node.input[0]].tolist()), rng)
        proto.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        proto.graph.node.remove(node)
    weights = {t.name for t in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.ir_version = 8
    last = proto.graph.node[-1]
    if last.op_type == "Softmax":  # saturated by random weights, it would hide every difference
        last.op_type = "Identity"
        del last.attribute[:]
    return proto


def _weight(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Around one for vectors (scales and variances), normal by fan-in otherwise."""
    if len(shape) == 1:
        return np.abs(rng.normal(1, 0.1, shape)).astype(np.float32)
    spread = math.sqrt(2 / max(math.prod(shape[1:]), 1))
    return rng.standard_normal(shape, np.float32) * np.float32(spread)
