"""Architectures as public libraries write them, captured, compiled and compared with PyTorch.

    python -m benchmarks.architectures [--only timm swin] [--density 0.1] [--target native]
                                       [--json FILE]

What `architectures.toml` lists is built with random weights, of which `--density` are kept: a check
of capture, passes, plan and kernels on graphs that nobody here wrote, not of speed or accuracy. The
libraries are not installed with sparsegraph: `pip install timm torchvision transformers`; what is
missing is left out, and said. All of it takes about an hour.

Exit codes: 0 all right, 1 something was refused or wrong, 2 wrong usage.
"""

import argparse
import importlib
import inspect
import json
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsegraph import verify
from sparsegraph.compile import compile
from sparsegraph.errors import SparsegraphError

TABLE = Path(__file__).with_suffix(".toml")
LIBRARIES = ("timm", "torchvision", "transformers")
NATIVE, MIXED, WRONG, REFUSED = "native", "with ONNX Runtime", "wrong", "refused"
LIMIT = 1e-4  # of max |a - b| / max |b| against PyTorch
_HEADS = r"(LMHead|Encoder)?Model$|For[A-Z]\w*$"  # what follows a family's name in transformers


@dataclass(frozen=True)
class Case:
    """One architecture: an image's side, a film's axes, or the options of a configuration."""

    library: str
    name: str
    options: Any

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The module in inference mode, and inputs for it. Raises what the library raises."""
        builders: Mapping[str, Callable[[str, Any], tuple[nn.Module, tuple[Any, ...]]]] = {
            "timm": _timm, "torchvision": _torchvision, "transformers": _transformers,
        }  # fmt: skip
        torch.manual_seed(0)
        module, inputs = builders[self.library](self.name, self.options)
        return First(module.eval(), tuple(inputs)), tuple(inputs.values())


@dataclass(frozen=True)
class Outcome:
    """What became of one case: who computes it, the distance from PyTorch, or the error."""

    library: str
    name: str
    kind: str
    error: float | None = None
    seconds: float = 0.0
    note: str = ""


class First(nn.Module):
    """The first tensor of floats that a module returns, of inputs in the order of `names`."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Any) -> Any:
        """The tensor."""
        result = self.module(**dict(zip(self.names, inputs)))
        if isinstance(result, torch.Tensor):
            return result
        values = result.values() if isinstance(result, Mapping) else result
        return next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


def cases(only: Sequence[str] = (), table: Path = TABLE) -> Iterator[Case]:
    """The cases whose library or name holds one of `only`."""
    read = tomllib.loads(table.read_text())
    defaults = read["transformers-defaults"]
    for library in LIBRARIES:
        for name, given in read[library].items():
            options = given
            if isinstance(given, dict):
                options = {**defaults.get(given["kind"], {}), **given}
            if not only or any(w.lower() in f"{library} {name}".lower() for w in only):
                yield Case(library, name, options)


def attempt(case: Case, density: float, target: str = "native") -> Outcome:
    """Build, prune at random, compile and compare with PyTorch."""
    start = time.perf_counter()

    def outcome(kind: str, error: float | None = None, note: str = "") -> Outcome:
        seconds = round(time.perf_counter() - start, 1)
        return Outcome(case.library, case.name, kind, error, seconds, note)

    try:
        module, inputs = case.build()
        with torch.no_grad():
            _scatter(module, density)
            wanted = module(*inputs).numpy()
    except Exception as error:  # of a library, for any reason
        return outcome(REFUSED, note=f"not built: {type(error).__name__}: {error}")
    try:
        compiled = compile(module, target, example_inputs=inputs, keep_native=True)
        found = compiled.run(None, _feed(compiled, inputs))[0]
    except SparsegraphError as error:
        return outcome(REFUSED, note=str(error))
    error = float(verify.compare({"y": found}, {"y": wanted}))
    if not error <= LIMIT:
        return outcome(WRONG, error)
    left = compiled.fallback_nodes
    return outcome(MIXED if left else NATIVE, error, ", ".join(left))


def _feed(compiled: Any, inputs: Sequence[Any]) -> verify.Feed:
    names = [i.name for i in compiled.session.get_inputs()]
    return dict(zip(names, (x.numpy() for x in inputs)))


def _scatter(module: nn.Module, density: float) -> None:
    """Zeros in the matrices; biases, scales and statistics that are not 0 and 1."""
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter += torch.randn_like(parameter) * 0.1
        else:
            if not parameter.any():  # heads begin with zeros
                parameter += torch.randn_like(parameter) * 0.02
            parameter *= (torch.rand_like(parameter) < density) / density**0.5
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)


def _timm(name: str, side: int) -> tuple[nn.Module, dict[str, Any]]:
    library = importlib.import_module("timm")
    module = library.create_model(name, pretrained=False, num_classes=10)
    return module, {"x": torch.randn(1, 3, side, side)}


def _torchvision(name: str, size: int | Sequence[int]) -> tuple[nn.Module, dict[str, Any]]:
    library = importlib.import_module("torchvision.models")
    options: dict[str, Any] = {"weights": None}
    if name.startswith("segmentation."):
        options["weights_backbone"] = None
    if name == "googlenet":
        options |= {"init_weights": False, "aux_logits": False}
    module = library.get_model(name.removeprefix("segmentation."), **options)
    (given,) = inspect.signature(module.forward).parameters
    axes = (size, size) if isinstance(size, int) else size
    return module, {given: torch.randn(1, 3, *axes)}


def _transformers(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    library = importlib.import_module("transformers")
    given = {key: value for key, value in options.items() if key not in ("kind", "config")}
    for key, value in given.items():
        if isinstance(value, dict):  # the backbone of a detector
            inner = {k: v for k, v in value.items() if k != "config"}
            given[key] = getattr(library, value["config"])(**inner)
    config = options.get("config", re.sub(_HEADS, "Config", name))
    module = getattr(library, name)(getattr(library, config)(**given))
    return module, _inputs(options["kind"], given)


def _inputs(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by name; of 16 tokens the last five are padding where a mask is given."""
    tokens = torch.randint(1, 90, (1, 16))
    side = options.get("image_size", 64)
    side = side if isinstance(side, int) else side[0]
    mask = (torch.arange(16)[None] < 11).long()
    return {
        "encoder": lambda: {"input_ids": tokens, "attention_mask": mask},
        "decoder": lambda: {"input_ids": tokens},
        "tokens": lambda: {"input_ids": tokens},
        "translation": lambda: {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]},
        "speech": lambda: {
            "input_features": torch.randn(1, options["num_mel_bins"], 60),
            "decoder_input_ids": tokens[:, :7],
        },
        "sound": lambda: {"input_values": torch.randn(1, 2000)},
        "images": lambda: {"pixel_values": torch.randn(1, 3, side, side)},
        "maps": lambda: {"pixel_values": torch.randn(1, 3, side, side)},
        "series": lambda: {
            "past_values": torch.randn(1, options["context_length"], options["num_input_channels"])
        },
    }[kind]()


def main(arguments: list[str] | None = None) -> int:
    """Parse, try, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in their names")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights kept")
    parser.add_argument("--target", default="native", help="a machine whose code runs here")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    options = parser.parse_args(arguments)
    if not 0 < options.density <= 1:
        parser.error(f"--density {options.density}: more than 0, at most 1")
    chosen = list(cases(options.only))
    if not chosen:
        parser.error(f"no architecture is called {' or '.join(options.only)}")
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    for name in missing:
        n = sum(case.library == name for case in chosen)
        print(f"{n} of {name} left out: pip install {name}", file=sys.stderr)
    outcomes = []
    for case in (c for c in chosen if c.library not in missing):
        outcomes.append(attempt(case, options.density, options.target))
        print(_line(outcomes[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    counts = Counter(o.kind for o in outcomes)
    print(", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "nothing was tried")
    return 1 if counts[WRONG] or counts[REFUSED] or not outcomes else 0


def _line(o: Outcome) -> str:
    error = "" if o.error is None else f"{o.error:.1e}"
    note = np.array(o.note.splitlines() or [""])[0][:300]
    return f"{o.library:13}{o.name:45}{o.kind:18}{error:9}{o.seconds:6.1f} s  {note}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
