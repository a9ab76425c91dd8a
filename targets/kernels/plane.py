"""What kernels over whole maps share: an item is one plane, and its result goes out in tiles.

The result plane is built row by row in scratch memory, where a row's last vector may overshoot into
the next row; `flush` then writes it as tiles of the feature-major output, pad points as zeros.
"""

from sparsegraph.targets.emit import Expr, bind, const, divide, load, loop, modulo, splat, store

OVERSHOOT = 64  # elements behind a scratch plane that the last row may spill into
PARAMS = "y:float32* y_image:int32 y_tile:int32 y_row:int32 x:float32* x_image:int32 x_row:int32 "


def plane_elements(tiles: int, block: int) -> int:
    """Scratch elements of one result plane."""
    return tiles * block + OVERSHOOT


def operands(a: dict[str, Expr], item: Expr) -> tuple[Expr, Expr]:
    """First elements of the item's output and input plane; items are images * features."""
    image, feature = bind(divide(item, a["features"])), bind(modulo(item, a["features"]))
    to = bind(image * a["y_image"] + feature * a["y_row"])
    return to, bind(image * a["x_image"] + feature * a["x_row"])


def flush(a: dict[str, Expr], plane: Expr, to: Expr, lanes: int) -> None:
    """Write the plane at `plane` in scratch into the tiles at `to`."""
    points = bind(a["height_out"] * a["width_out"])
    pad = bind(a["tiles"] * a["block"] - points)
    with loop(0, divide(pad + (lanes - 1), lanes)) as v:
        store(a["scratch"], splat(const(0.0), lanes), plane + points + v * lanes, lanes)
    vectors = bind(divide(a["block"], lanes))
    with loop(0, a["tiles"]) as tile:
        source, target = bind(plane + tile * a["block"]), bind(to + tile * a["y_tile"])
        with loop(0, vectors) as v:
            store(a["y"], load(a["scratch"], source + v * lanes, lanes), target + v * lanes, lanes)
