"""Loops over a contiguous run: whole vectors, then the rest one by one."""

from collections.abc import Callable

from sparsegraph.targets import emit
from sparsegraph.targets.emit import Expr, T


def each_vector(n: Expr, lanes: int, visit: Callable[[Expr, int], None]) -> None:
    """visit(position, width) over [0, n), `width` lanes or 1; lanes is a power of two.

    The rest is n & (lanes - 1): LLVM then knows that it is short and does not vectorise it.
    """
    vectors = emit.bind(T.truncdiv(n, emit.const(lanes, "int32")))
    with emit.loop(0, vectors) as v:
        visit(v * lanes, lanes)
    done = emit.bind(vectors * lanes)
    with emit.loop(0, T.bitwise_and(n, emit.const(lanes - 1, "int32"))) as rest:
        visit(done + rest, 1)
