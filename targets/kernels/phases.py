"""Even and odd rows and columns of maps apart: of windows with stride 2 every tap is then a shift.

    y[n, c, 2 * (i % 2) + j % 2, i // 2, j // 2] = x[n, c, i, j]

One pass over the map makes the gather of a product flat (`kernels.gather`): whole vectors, no
shuffles, no cuts at the ends of rows. Every phase has as many rows and columns as the largest one;
what a smaller one lacks is undefined, and no window reads it. Items are images * channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sparsegraph.targets import emit
from sparsegraph.targets.emit import bind, loop, store
from sparsegraph.targets.target import Target

PHASES = 4
_LINE = 16  # float32 values in a cache line


@dataclass(frozen=True)
class Phases:
    """Spec of one kernel.

    Arguments: planar y of four planes a channel and planar x, the distance of two phases, extents
    of a map of x, channels.
    """

    lanes: int

    @property
    def name(self) -> str:
        return f"phases_f32_l{self.lanes}"

    @property
    def params(self) -> emit.Signature:
        return emit.signature(
            "y:float32* y_image:int32 y_row:int32 x:float32* x_image:int32 x_row:int32 "
            "plane:int32 height:int32 width:int32 channels:int32"
        )

    def plane(self, height: int, width: int) -> int:
        """Elements from one phase to the next: the last vector of a row overshoots it."""
        size = -(-height // 2) * -(-width // 2) + self.lanes
        return -(-size // _LINE) * _LINE

    def body(self, target: Target) -> Any:
        is_joined = target.joined > 1

        def emit_loops(**a: Any) -> None:
            lanes = self.lanes
            half = bind(emit.divide(a["width"] + 1, 2))
            with loop(a["begin"], a["end"]) as item:
                image = bind(emit.divide(item, a["channels"]))
                channel = bind(item - image * a["channels"])
                x = bind(image * a["x_image"] + channel * a["x_row"])
                y = bind(image * a["y_image"] + channel * a["y_row"])
                with loop(0, a["height"]) as i:
                    source = bind(x + i * a["width"])
                    down = bind(emit.divide(i, 2))
                    to = bind(y + (i - down * 2) * (2 * a["plane"]) + down * half)
                    with loop(0, emit.divide(half + lanes - 1, lanes)) as v:
                        at = bind(v * lanes)
                        pair = emit.pair(a["x"], source + at * 2, lanes, is_joined=is_joined)
                        for odd in (0, 1):
                            values = emit.shuffle(pair, range(odd, 2 * lanes, 2))
                            store(a["y"], values, to + odd * a["plane"] + at, lanes)

        return emit_loops


def reference(x: np.ndarray) -> np.ndarray:
    """[.., height, width] -> [.., 4, (height + 1) / 2, (width + 1) / 2]; 0 where there is none."""
    height, width = x.shape[-2:]
    even = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, height % 2), (0, width % 2)])
    return np.stack([even[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-3)
