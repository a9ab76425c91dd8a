"""What to prune and how: the recipe's text form, and the layers that it selects."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from sparsegraph.errors import UsageError, message
from sparsegraph.layers import Layer, weighted
from sparsegraph.reconstruct import Structure

METHODS = ("magnitude", "wanda", "sparsegpt", "admm")
_FORM = "method:0.7, method:2:4 or method:0.7:8x1, then ,key=value"
_AMOUNT = re.compile(r"(?:(?P<n>\d+):(?P<m>\d+)|(?P<share>\d*\.?\d+))(?::(?P<rows>\d+)x1)?")
_LEAST_COLUMNS = 16  # depthwise kernels and the like: nothing to choose from, nothing to gain
_IMAGE_CHANNELS = 4  # a convolution that reads at most these is the stem: cheap and sensitive


@dataclass(frozen=True)
class Recipe:
    """A pruning method, how many zeros in which structure, and the layers.

    `layers` and `ignore` are regular expressions searched in node and weight names (empty `layers`:
    all). `mask` names the model input whose zeros mark padding that calibration leaves out.
    `compensate` lets a layer aim at the original model's outputs; it needs `sequential`.
    """

    method: str
    structure: Structure
    layers: str = ""
    ignore: str = ""
    sequential: bool = True
    compensate: bool = True
    correct_bias: bool = True
    mask: str = "attention_mask"

    @property
    def needs_calibration(self) -> bool:
        return self.method != "magnitude"

    @staticmethod
    def parse(text: str) -> Recipe:
        """Read `admm:0.7`, `sparsegpt:2:4`, `wanda:0.8:8x1,ignore=head,sequential=no`.

        `2:4` keeps 2 of 4 neighbouring inputs, `8x1` lets 8 outputs share their inputs. Options are
        the fields above; flags take yes or no. Raises UsageError naming the part that is wrong.
        """
        head, *options = text.split(",")
        method, _, amount = head.strip().partition(":")
        if method not in METHODS:
            need = "one of " + ", ".join(METHODS)
            raise UsageError(message("recipe", text, f"method '{method}'", need, f"write {_FORM}"))
        fields = dict(_option(text, option) for option in options)
        sequential = fields.get("sequential", "yes")
        compensate = fields.get("compensate", sequential)
        if compensate == "yes" and sequential == "no":
            found, need = "compensate=yes with sequential=no", "both, or neither"
            raise UsageError(message("recipe", text, found, need, "drop one option"))
        return Recipe(
            method,
            _structure(text, method, amount),
            layers=fields.get("layers", ""),
            ignore=fields.get("ignore", ""),
            sequential=sequential == "yes",
            compensate=compensate == "yes",
            correct_bias=fields.get("correct_bias", "yes") == "yes",
            mask=fields.get("mask", "attention_mask"),
        )

    def __str__(self) -> str:
        return f"{self.method}:{self.structure}"


_FLAGS = ("sequential", "compensate", "correct_bias")
_TEXTS = ("layers", "ignore", "mask")


def _option(text: str, option: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in option.partition("="))
    if key not in _FLAGS + _TEXTS or not equals:
        need = "key=value with key in " + ", ".join(_FLAGS + _TEXTS)
        raise UsageError(message("recipe", text, f"option '{option}'", need, f"write {_FORM}"))
    if key in _FLAGS and value not in ("yes", "no"):
        raise UsageError(message("recipe", text, f"{key}={value}", "yes or no", f"write {key}=no"))
    if key in ("layers", "ignore"):
        try:
            re.compile(value)
        except re.error as error:
            found, fix = f"{key}={value} ({error})", "correct the expression"
            raise UsageError(message("recipe", text, found, "a regular expression", fix)) from error
    return key, value


def _structure(text: str, method: str, amount: str) -> Structure:
    match = _AMOUNT.fullmatch(amount)
    if match is None:
        fix = f"write {_FORM}"
        raise UsageError(message("recipe", text, f"amount '{amount}'", "a share or N:M", fix))
    rows = int(match["rows"] or 1)
    n, m = int(match["n"] or 0), int(match["m"] or 0)
    if match["m"] is not None and not 0 < n < m:
        raise UsageError(message("recipe", text, f"{n}:{m}", "0 < N < M", "write for instance 2:4"))
    share = float(match["share"] or 0)
    if match["share"] is not None and not 0 <= share < 1:
        raise UsageError(message("recipe", text, share, "0 <= share < 1", "write 0.7 for 70 %"))
    if rows < 1:
        raise UsageError(message("recipe", text, f"{rows}x1", "at least 1x1", "write 8x1"))
    return Structure(sparsity=share, n=n, m=m, rows=rows, per_row=method != "magnitude")


def select(model: ir.Model, recipe: Recipe) -> tuple[list[Layer], list[tuple[str, str]]]:
    """(layers to prune, (name, reason) of those left alone), both in execution order.

    Raises UsageError when nothing is left to prune.
    """
    chosen, skipped = [], []
    for layer in weighted(model):
        reason = next((why for holds, why in _REASONS if holds(layer, recipe)), "")
        if reason:
            skipped.append((layer.name, reason))
        else:
            chosen.append(layer)
    if not chosen:
        found = f"no layer to prune among {len(skipped)}"
        need, fix = "at least one", "widen layers= or narrow ignore="
        raise UsageError(message("recipe", str(recipe), found, need, fix))
    return chosen, skipped


def _is_named(layer: Layer, pattern: str) -> bool:
    names = (layer.name, layer.value.name or "")
    return any(re.search(pattern, name) for name in names)


def _is_image_stem(layer: Layer) -> bool:
    inputs = layer.matrix().shape[1] * layer.group
    return layer.node.op_type == "Conv" and inputs <= _IMAGE_CHANNELS


_Test = Callable[[Layer, Recipe], bool]
_REASONS: tuple[tuple[_Test, str], ...] = (
    (lambda layer, recipe: not _is_named(layer, recipe.layers), "not selected by layers="),
    (
        lambda layer, recipe: bool(recipe.ignore) and _is_named(layer, recipe.ignore),
        "selected by ignore=",
    ),
    (lambda layer, recipe: layer.quantised, "quantised weight"),
    (lambda layer, recipe: layer.array().dtype.kind != "f", "weight is not floating point"),
    (
        lambda layer, recipe: not layer.is_convolution and layer.array().ndim > 2,
        "one weight per batch entry",
    ),
    (
        lambda layer, recipe: len(layer.value.uses()) > 1 or layer.value.is_graph_output(),
        "weight is shared with another node or is an output",
    ),
    (lambda layer, recipe: layer.value.is_graph_input(), "weight can be overridden by an input"),
    (lambda layer, recipe: layer.product().shape[2] < _LEAST_COLUMNS, "fewer than 16 inputs"),
    (lambda layer, recipe: _is_image_stem(layer), "reads the image"),
)
