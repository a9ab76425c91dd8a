"""What kernels over whole maps share: an item is one plane, and its result goes out in tiles.

The result grows row by row in a window of scratch memory, where a row's last vector may overshoot
into the next row. Whole tiles leave the window for the feature-major output as soon as it holds
`FULL` points, so the window stays in the level 1 cache; pad points are written as zeros.
"""

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Cell, Expr, bind, const, divide, load, loop, splat, store

OVERSHOOT = 64  # elements behind a row that its last vectors may spill into
FULL = 2048  # points that wait at most, one row more (8 KB)
PARAMS = "y:float32* y_image:int32 y_tile:int32 y_row:int32 x:float32* x_image:int32 x_row:int32 "


def window_elements(width_out: int, block: int) -> int:
    """Scratch elements of the window."""
    return FULL + width_out + 2 * block + OVERSHOOT


class Plane:
    """The result plane of one item.

    Takes of the arguments `a`: y_tile, features, width_out, height_out, tiles, block, scratch.
    """

    def __init__(self, a: dict[str, Expr], item: Expr, window: Expr, lanes: int) -> None:
        self.a, self.lanes, self.window = a, lanes, window
        image, feature = bind(divide(item, a["features"])), bind(emit.modulo(item, a["features"]))
        self.to = bind(image * a["y_image"] + feature * a["y_row"])
        self.source = bind(image * a["x_image"] + feature * a["x_row"])
        self.tile = Cell("int32")  # tiles that have left
        self.tile.set(const(0, "int32"))

    def row(self, row: Expr) -> Expr:
        """Where in scratch an output row begins."""
        return bind(self.window + row * self.a["width_out"] - self.tile.get() * self.a["block"])

    def end_row(self, row: Expr) -> None:
        """Send whole tiles out if enough points wait; the rest moves to the window's start."""
        a, lanes = self.a, self.lanes
        points = bind((row + 1) * a["width_out"] - self.tile.get() * a["block"])
        with emit.when(points >= FULL):
            tiles = bind(divide(points, a["block"]))
            self._send(tiles)
            rest = bind(self.window + tiles * a["block"])
            with loop(0, divide(a["block"], lanes)) as v:
                value = load(a["scratch"], rest + v * lanes, lanes)
                store(a["scratch"], value, self.window + v * lanes, lanes)

    def end(self) -> None:
        """Send out what is left."""
        a, lanes = self.a, self.lanes
        total = bind(a["height_out"] * a["width_out"])
        end = bind(self.window + total - self.tile.get() * a["block"])
        pad = bind(a["tiles"] * a["block"] - total)
        with loop(0, divide(pad + (lanes - 1), lanes)) as v:
            store(a["scratch"], splat(const(0.0), lanes), end + v * lanes, lanes)
        self._send(bind(a["tiles"] - self.tile.get()))

    def finish(self, value: Expr, tile: Expr, point: Expr) -> Expr:
        """What leaves instead of `value`, the vector at `point` of a tile."""
        return value

    def _send(self, tiles: Expr) -> None:
        a, lanes = self.a, self.lanes
        vectors, first = bind(divide(a["block"], lanes)), bind(self.tile.get())
        with loop(0, tiles) as tile:
            source = bind(self.window + tile * a["block"])
            to = bind(self.to + (first + tile) * a["y_tile"])
            with loop(0, vectors) as v:
                value = load(a["scratch"], source + v * lanes, lanes)
                store(a["y"], self.finish(value, first + tile, v * lanes), to + v * lanes, lanes)
        self.tile.set(first + tiles)
