"""Loops over a contiguous run: whole vectors or groups of rows, then the rest."""

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


def in_groups(count: Expr, most: int, body: Callable[[Expr, int], None]) -> None:
    """body(first, group) over `count` rows in groups of `most`; the rest in pairs and alone."""
    done: Expr = emit.const(0, "int32")
    for group in sorted({most, min(2, most), 1}, reverse=True):
        full = emit.bind(emit.divide(count - done, group))
        first = done
        with emit.loop(0, full) as g:
            body(emit.bind(first + g * group), group)
        done = emit.bind(first + full * group)


def unrolled(count: Expr, n: int, body: Callable[[Expr], None]) -> None:
    """body(i) over [0, count), `n` of them at once, then the rest."""
    whole = emit.bind(emit.divide(count, n))
    with emit.loop(0, whole) as i:
        first = emit.bind(i * n)
        for step in range(n):
            body(emit.bind(first + step))
    with emit.loop(whole * n, count) as i:
        body(i)
