"""What the structure analysis knows about an operator: one `Rule` per operator, see `table`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsegraph.structure.cut import Cut
from sparsegraph.structure.known import Knowns
from sparsegraph.structure.ties import TieRule

Mask = NDArray[np.bool_]
KnownRule: TypeAlias = Callable[[Knowns, ir.Node], None]
CutRule: TypeAlias = Callable[[Cut, ir.Node], None]
SilentRule: TypeAlias = Callable[[ir.Node, int], Mask | None]
FoldRule: TypeAlias = Callable[[ir.Node, int], NDArray[np.float64] | str]
Shelf: TypeAlias = tuple[int, int]
"""Input and axis of the constant that a summed axis is multiplied with."""
ShelfRule: TypeAlias = Callable[[ir.Node, int], Shelf | None]


@dataclass(frozen=True)
class Rule:
    """How an operator treats labels, constants and removal.

    `tie` carries labels from inputs to outputs. `known` carries constants (without it nothing is
    known of the outputs). `cut` adapts attributes and shape constants (without it nothing needs
    to be). `silent(node, at)`: which positions of the summed axis of input `at` the node ignores
    whatever they hold. `fold(node, at)`: [position, output], what the output gains when a position
    holds one everywhere, or the reason why that is no constant per output. `shelf(node, at)`: the
    constant that is linear in input `at`, position by position; None where there is no single one.
    """

    tie: TieRule
    known: KnownRule | None = None
    cut: CutRule | None = None
    silent: SilentRule | None = None
    fold: FoldRule | None = None
    shelf: ShelfRule | None = None
