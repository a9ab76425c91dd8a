"""What is measured: a table of layers and models with their sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import onnx

from benchmarks import prune, real_models, zoo
from benchmarks.zoo import tagger

DENSITIES = (1.0, 0.2, 0.1, 0.05)
"""0, 80, 90 and 95 % zeros."""


@dataclass(frozen=True)
class Workload:
    """A model at one size, the selector of its pruned layers included."""

    kind: str
    name: str
    make: Callable[[], onnx.ModelProto]
    selector: prune.Selector = field(default=prune.all_layers)

    def build(self, density: float, pattern: str = "unstructured") -> onnx.ModelProto:
        """The model with its layers pruned to `density`."""
        return prune.magnitude(self.make(), density, layers=self.selector, pattern=pattern)


def _layer(name: str, model: str, **sizes: int) -> Workload:
    return Workload("layers", name, partial(zoo.build, model, **sizes))


def _conv(kernel: int, size: int, c_in: int, c_out: int) -> Workload:
    name = f"conv-{kernel}x{kernel}-{size}-{c_in}-{c_out}"
    return _layer(name, "conv", c_in=c_in, c_out=c_out, kernel=kernel, size=size)


def _gemm(m: int, k: int, n: int) -> Workload:
    return _layer(f"gemm-{m}x{k}x{n}", "gemm", m=m, k=k, n=n)


def _model(name: str, model: str, **sizes: int) -> Workload:
    return Workload("models", name, partial(zoo.build, model, **sizes), prune.selector_for(model))


def _real(name: str) -> Workload:
    selector = prune.encoder_linears if name == "minilm_real" else prune.all_but_the_stem
    return Workload("models", name, partial(real_models.load, name), selector)


_ALL = (
    _gemm(384, 768, 3072),
    _gemm(128, 384, 1536),
    _gemm(49, 1024, 1024),
    _conv(1, 56, 64, 256),
    _conv(1, 14, 1024, 256),
    _conv(3, 28, 128, 128),
    _conv(3, 14, 256, 256),
    _conv(3, 7, 512, 512),
    _model("resnet50", "resnet50"),
    _model("mobilenet_v1", "mobilenet_v1"),
    _model("minilm-128", "minilm", sequence=128),
    _model("minilm-384", "minilm", sequence=384),
    _model("resnet18", "resnet18"),
    _model("mobilenet_v2", "mobilenet_v2"),
    _model("efficientnet_lite0", "efficientnet_lite0"),
    _model("yolov8n-320", "yolov8n", size=320),
    _model("deit_tiny", "deit_tiny"),
    _model("deit_small", "deit_small"),
    _model("digits_cnn", "digits_cnn"),
    Workload("models", "lstm-tagger", tagger.tagger),
    *(_real(name) for name in real_models.names()),
)

WORKLOADS: Mapping[str, Workload] = {w.name: w for w in _ALL}


def of_kind(kind: str) -> list[Workload]:
    """Workloads of a kind, in the order of the table; real models only where installed."""
    missing = set(real_models.names()) - set(real_models.available())
    return [w for w in _ALL if w.kind == kind and w.name not in missing]
