"""What to prune and how: the recipe's text form, and the layers that it selects."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsegraph.budget.allocate import ALLOCATIONS, FORWARD, UNIFORM
from sparsegraph.criteria.structure import INPUTS, OUTPUTS, Structure
from sparsegraph.criteria.table import CRITERIA, GRADIENTS, NOTHING, SENSITIVITY, Criterion
from sparsegraph.errors import UsageError, message
from sparsegraph.layers import Layer, recurrent, unfolded, weighted

MASKS = "masks"  # no criterion: masks come from outside
OPTIMISE = "optimise first: `sparsegraph optimize model.onnx -o folded.onnx`, or sg.optimize"
_SHORT = {"lamp": ("magnitude", "lamp")}  # name -> criterion, allocation
METHODS = (*CRITERIA, *_SHORT, MASKS)
_FORM = "method:0.7, method:2:4, method:0.7:8x1, method:0.5:channels or masks, then ,key=value"
_AMOUNT = re.compile(
    r"(?:(?P<n>\d+):(?P<m>\d+)|(?P<share>\d*\.?\d+))"
    r"(?::(?:(?P<rows>\d+)x(?P<columns>\d+)|(?P<channels>channels)))?"
)
_LARGEST = 4096  # M of N:M, or side of a block
_LEAST_COLUMNS = 16  # depthwise kernels and the like: nothing to choose from, nothing to gain
_IMAGE_CHANNELS = 4  # a convolution that reads at most these is the stem: cheap and sensitive


@dataclass(frozen=True)
class Recipe:
    """A pruning method, how many zeros in which structure, and the layers.

    `layers` and `ignore` are regular expressions searched in node and weight names (empty `layers`:
    all). `mask` names the model input whose zeros mark padding that calibration leaves out.
    `compensate` lets a layer whose kept weights move aim at the original model's outputs; it needs
    `sequential`. `balance` lets every calibration feed count alike, however many rows it has: where
    texts are pooled, a short one matters as much. `swap` and `refit` improve mask and values
    afterwards. `allocate` spreads the share of zeros over layers, leaving each at least the share
    `floor` of its weights. `permute` reorders inner channels first, so that N:M groups keep more;
    `batch_norm` corrects the batch norms in the end. `seed` is for random masks and probes.
    """

    method: str
    structure: Structure
    layers: str = ""
    ignore: str = ""
    sequential: bool = True
    compensate: bool = True
    correct_bias: bool = True
    balance: bool = False
    swap: bool = False
    refit: bool = False
    permute: bool = False
    batch_norm: bool = False
    allocate: str = UNIFORM
    floor: float = 0.05
    seed: int = 0
    mask: str = "attention_mask"

    @property
    def criterion(self) -> Criterion | None:
        """None where masks come from outside."""
        return CRITERIA.get(self.method)

    @property
    def needs_calibration(self) -> bool:
        needs = NOTHING if self.criterion is None else self.criterion.needs
        is_measured = needs not in (NOTHING, GRADIENTS, SENSITIVITY)
        return is_measured or self.swap or self.refit or self.batch_norm

    @property
    def moves_weights(self) -> bool:
        """Whether kept weights change, so that they can aim at another target than themselves."""
        return self.refit or (self.criterion is not None and self.criterion.moves_weights)

    @property
    def compensates(self) -> bool:
        """Whether layers aim at the original outputs: only those whose weights move.

        A bias alone that follows the original mean through all layers takes Wanda at 50 % zeros on
        the PP-OCRv6 recogniser from .93 of the lines to none.
        """
        return self.compensate and self.moves_weights

    @staticmethod
    def parse(text: str) -> Recipe:
        """Read `admm:0.7`, `sparsegpt:2:4`, `wanda:0.8:8x1,ignore=head,sequential=no`, `masks`.

        `2:4` keeps 2 of 4 neighbouring inputs (of 4 outputs with `axis=outputs`), `8x1` lets 8
        outputs share their inputs, `4x4` makes blocks, `channels` takes whole input channels.
        Options are the fields above and `axis`; flags take yes or no. Raises UsageError naming the
        part that is wrong.
        """
        head, *options = text.split(",")
        method, _, amount = head.strip().partition(":")
        if method not in METHODS:
            need = "one of " + ", ".join(METHODS)
            raise UsageError(message("recipe", text, f"method '{method}'", need, f"write {_FORM}"))
        given = [_option(text, option) for option in options]
        fields = dict(given)
        criterion, allocation = _SHORT.get(method, (method, UNIFORM))
        twice = [key for key in fields if [k for k, _ in given].count(key) > 1]
        if twice or fields.get("allocate", allocation) != allocation != UNIFORM:
            found, need = f"{(twice or ['allocate'])[0]} twice", "every option once"
            raise UsageError(message("recipe", text, found, need, "drop one of them"))
        sequential = fields.get("sequential", "yes")
        compensate = fields.get("compensate", sequential)
        if compensate == "yes" and sequential == "no":
            found, need = "compensate=yes with sequential=no", "both, or neither"
            raise UsageError(message("recipe", text, found, need, "drop one option"))
        recipe = Recipe(
            criterion,
            _structure(text, criterion, amount, fields.get("axis", INPUTS)),
            layers=fields.get("layers", ""),
            ignore=fields.get("ignore", ""),
            sequential=sequential == "yes",
            compensate=compensate == "yes",
            correct_bias=fields.get("correct_bias", "yes") == "yes",
            swap=fields.get("swap", "no") == "yes",
            refit=fields.get("refit", "no") == "yes",
            permute=fields.get("permute", "no") == "yes",
            batch_norm=fields.get("batch_norm", "no") == "yes",
            balance=fields.get("balance", "no") == "yes",
            allocate=fields.get("allocate", allocation),
            floor=float(fields.get("floor", "0.05")),
            seed=int(fields.get("seed", "0")),
            mask=fields.get("mask", "attention_mask"),
        )
        _check(text, recipe)
        return recipe

    def __str__(self) -> str:
        head = self.method if self.method == MASKS else f"{self.method}:{self.structure}"
        extras = [f"{flag}=yes" for flag in _EXTRAS if getattr(self, flag)]
        extras += [f"allocate={self.allocate}"] if self.allocate != UNIFORM else []
        return ",".join([head, *extras])


_EXTRAS = ("balance", "swap", "refit", "permute", "batch_norm")
_FLAGS = ("sequential", "compensate", "correct_bias", *_EXTRAS)
_EXPRESSIONS = ("layers", "ignore")
_CHOICES = {"allocate": (*ALLOCATIONS, FORWARD), "axis": (INPUTS, OUTPUTS)} | {
    flag: ("yes", "no") for flag in _FLAGS
}
_NUMBERS = {"floor": (r"0?\.\d+|0", "a share below 1"), "seed": (r"\d+", "a whole number")}
_KEYS = (*_FLAGS, *_EXPRESSIONS, "mask", "allocate", "floor", "seed", "axis")


def _option(text: str, option: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in option.partition("="))
    if key not in _KEYS or not equals:
        need = "key=value with key in " + ", ".join(_KEYS)
        raise UsageError(message("recipe", text, f"option '{option}'", need, f"write {_FORM}"))
    choices = _CHOICES.get(key)
    if choices is not None and value not in choices:
        need = " or ".join(choices)
        raise UsageError(message("recipe", text, option.strip(), need, f"write {key}={choices[0]}"))
    if key in _NUMBERS and not re.fullmatch(_NUMBERS[key][0], value):
        need = _NUMBERS[key][1]
        raise UsageError(message("recipe", text, option.strip(), need, f"write {key}=0"))
    if key in _EXPRESSIONS:
        try:
            re.compile(value)
        except re.error as error:
            found, fix = f"{key}={value} ({error})", "correct the expression"
            raise UsageError(message("recipe", text, found, "a regular expression", fix)) from error
    return key, value


def _structure(text: str, method: str, amount: str, axis: str) -> Structure:
    if method == MASKS:
        if amount:
            need, fix = "no amount: masks say what stays", "write masks"
            raise UsageError(message("recipe", text, f"amount '{amount}'", need, fix))
        return Structure()
    match = _AMOUNT.fullmatch(amount)
    if match is None:
        fix = f"write {_FORM}"
        found = f"amount '{amount}'" if amount else "no amount"
        raise UsageError(message("recipe", text, found, "a share or N:M", fix))
    rows, columns = int(match["rows"] or 1), int(match["columns"] or 1)
    n, m = int(match["n"] or 0), int(match["m"] or 0)
    if match["m"] is not None and not 0 < n < m:
        raise UsageError(message("recipe", text, f"{n}:{m}", "0 < N < M", "write for instance 2:4"))
    share = float(match["share"] or 0)
    if match["share"] is not None and not 0 <= share < 1:
        raise UsageError(message("recipe", text, share, "0 <= share < 1", "write 0.7 for 70 %"))
    if min(rows, columns) < 1:
        raise UsageError(message("recipe", text, f"{rows}x{columns}", "at least 1x1", "write 8x1"))
    if max(rows, columns, m) > _LARGEST:
        need, fix = f"groups and sides of at most {_LARGEST}", "write for instance 2:4"
        raise UsageError(message("recipe", text, max(rows, columns, m), need, fix))
    per_row = CRITERIA[method].per_row
    return Structure(share, n, m, rows, columns, per_row, axis, match["channels"] is not None)


def _check(text: str, recipe: Recipe) -> None:
    """Raise UsageError for options that contradict each other."""
    if recipe.structure.axis == OUTPUTS and not recipe.structure.m:
        fix = "write for instance 2:4,axis=outputs"
        raise UsageError(message("recipe", text, "axis=outputs with a share", "N:M", fix))
    if recipe.allocate != UNIFORM and (recipe.structure.m or recipe.method == MASKS):
        found, fix = f"allocate={recipe.allocate} with a fixed density", "drop one of them"
        raise UsageError(message("recipe", text, found, "a share of zeros", fix))
    if recipe.permute and (not recipe.structure.m or recipe.structure.axis == OUTPUTS):
        fix = "write for instance admm:2:4,permute=yes"
        raise UsageError(message("recipe", text, "permute=yes", "N:M along inputs", fix))
    if recipe.swap and recipe.method == MASKS:
        need, fix = "masks as they are", "drop swap=yes"
        raise UsageError(message("recipe", text, "swap=yes with masks", need, fix))


def select(model: ir.Model, recipe: Recipe) -> tuple[list[Layer], list[tuple[str, str]]]:
    """(layers to prune, (name, reason) of those left alone), both in execution order.

    Raises UsageError when nothing is left to prune.
    """
    chosen, skipped = [], []
    for layer in weighted(model):
        reason = next((why for holds, why in _CHOSEN if holds(layer, recipe)), "")
        reason = reason or impossible(layer) or unwise(layer, recipe.structure)
        if reason:
            skipped.append((layer.name, reason))
        else:
            chosen.append(layer)
    hidden = unfolded(model)
    skipped += [(name, f"its weight is computed: {OPTIMISE}") for name in hidden]
    skipped += [(name, "recurrent: only the recipe masks prunes it") for name in recurrent(model)]
    if not chosen:
        found = f"no layer to prune among {len(skipped)}"
        need, fix = "at least one", "widen layers= or narrow ignore="
        if hidden:
            found = f"{found}, of which {len(hidden)} compute their weights from constants"
            fix = OPTIMISE
        elif skipped:
            found = f"{found} ('{skipped[0][0]}': {skipped[0][1]})"
        raise UsageError(message("recipe", str(recipe), found, need, fix))
    return chosen, skipped


def impossible(layer: Layer) -> str:
    """Why a layer cannot be measured and repaired on its own; empty if it can."""
    return next((why for holds, why in _IMPOSSIBLE if holds(layer)), "")


def unwise(layer: Layer, structure: Structure) -> str:
    """Why a criterion should leave a layer alone; empty if it should not."""
    out, inputs = layer.matrix().shape[:2]
    n_taps = layer.matrix()[0, 0].size
    rows, columns = layer.product().shape[1:]
    if columns < _LEAST_COLUMNS:
        return f"fewer than {_LEAST_COLUMNS} inputs"
    if structure.has_blocks and rows <= structure.rows and columns <= structure.columns:
        return "no larger than one block"
    if layer.node.op_type == "Conv" and inputs * layer.group <= _IMAGE_CHANNELS:
        return "reads the image"
    if layer.node.op_type == "Conv" and n_taps > 1 and inputs % structure.run:
        return f"{inputs} inputs per kernel position are no multiple of {structure.run}"
    if layer.node.op_type == "ConvTranspose" and n_taps > 1 and structure.stack > 1:
        return "outputs and kernel positions alternate: no groups of outputs"
    if layer.group > 1 and out // layer.group % structure.stack:
        return f"{out // layer.group} outputs per group are no multiple of {structure.stack}"
    return ""


def _is_named(layer: Layer, pattern: str) -> bool:
    names = (layer.name, layer.value.name or "")
    return any(re.search(pattern, name) for name in names)


_CHOSEN: tuple[tuple[Callable[[Layer, Recipe], bool], str], ...] = (
    (lambda layer, recipe: not _is_named(layer, recipe.layers), "not selected by layers="),
    (
        lambda layer, recipe: bool(recipe.ignore) and _is_named(layer, recipe.ignore),
        "selected by ignore=",
    ),
)
_IMPOSSIBLE: tuple[tuple[Callable[[Layer], bool], str], ...] = (
    (lambda layer: layer.quantised, "quantised weight"),
    (lambda layer: layer.array().dtype.kind != "f", "weight is not floating point"),
    (lambda layer: not np.isfinite(layer.array()).all(), "weight has NaN or infinite values"),
    (
        lambda layer: not layer.is_convolution and layer.array().ndim > 2,
        "one weight per batch entry",
    ),
    (
        lambda layer: len(layer.value.uses()) > 1 or layer.value.is_graph_output(),
        "weight is shared with another node or is an output",
    ),
    (lambda layer: layer.value.is_graph_input(), "weight can be overridden by an input"),
)
