"""Reference models as plain ONNX with seeded random weights: `build(name, **sizes)`, `names()`.

Speed depends on shapes and zeros, not on values, so random weights serve every timing.
"""

from collections.abc import Callable

import onnx

from benchmarks.zoo import digits, layers, mobilenet, resnet, transformer, yolo
from benchmarks.zoo.counts import macs, parameters
from benchmarks.zoo.feeds import Feeds, feeds

__all__ = ["Feeds", "build", "feeds", "macs", "names", "parameters"]

_BUILDERS: dict[str, Callable[..., onnx.ModelProto]] = {
    "gemm": layers.gemm,
    "conv": layers.conv,
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
    "mobilenet_v1": mobilenet.mobilenet_v1,
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "efficientnet_lite0": mobilenet.efficientnet_lite0,
    "yolov8n": yolo.yolov8n,
    "minilm": transformer.minilm,
    "deit_tiny": transformer.deit_tiny,
    "deit_small": transformer.deit_small,
    "digits_cnn": digits.digits_cnn,
}


def names() -> tuple[str, ...]:
    """The models that `build` knows, single layers first."""
    return tuple(_BUILDERS)


def build(name: str, **sizes: int) -> onnx.ModelProto:
    """Build model `name`; `sizes` are the keyword arguments of its builder."""
    if name not in _BUILDERS:
        raise KeyError(f"no model '{name}' in the zoo: it has {', '.join(_BUILDERS)}")
    return _BUILDERS[name](**sizes)
