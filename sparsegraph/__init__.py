"""sparsegraph: an export-time compiler for sparse and masked neural networks.

    import sparsegraph as sg

    model = sg.capture(module, example_inputs)  # or sg.load("model.onnx")
    model = sg.prune(model, "wanda:0.6", calibration=feeds).model
    compiled = sg.compile(model, target="native", output="model.sg")
    outputs = sg.InferenceSession("model.sg").run(None, {"x": x})

Everything is imported on first use, so that `import sparsegraph` costs next to nothing.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsegraph import errors
    from sparsegraph.bench import bench
    from sparsegraph.capture import capture, load
    from sparsegraph.compile import Compiled, compile
    from sparsegraph.inspect import inspect
    from sparsegraph.pipeline import optimize
    from sparsegraph.prune import prune
    from sparsegraph.runtime import InferenceSession
    from sparsegraph.shrink import shrink

__all__ = [
    "Compiled",
    "InferenceSession",
    "bench",
    "capture",
    "compile",
    "errors",
    "inspect",
    "load",
    "optimize",
    "prune",
    "shrink",
]
__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "passes" / "__init__.py").exists():  # a bare checkout: the two siblings are ours
    __path__.append(str(_ROOT))

_FROM = {
    "Compiled": "compile",
    "InferenceSession": "runtime",
    "load": "capture",
    "optimize": "pipeline",
}
_NAMESAKES = frozenset({"bench", "capture", "compile", "inspect", "prune", "shrink"})


class _Verb(ModuleType):
    """A module whose main function has its name: calling the module calls the function."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    """Makes `sg.compile(...)` work whether or not `sparsegraph.compile` is imported already."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _NAMESAKES and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f"sparsegraph.{_FROM[name]}"), name)
    if name in _NAMESAKES or name == "errors":
        return importlib.import_module(f"sparsegraph.{name}")
    raise AttributeError(f"module 'sparsegraph' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
