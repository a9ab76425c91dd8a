"""Which steps of a `Program` go tile by tile instead of one after the other.

A product writes a tile of points; the layer norm, the next product, the layout change behind it
read the same tile. Run step by step, a large value has gone to the outer caches before it is read
again; run tile by tile, it is still near, and where nothing else reads it one tile of memory per
thread is enough. The price: each tile streams the weights of all steps of the chain, so these have
to fit the level 2 cache together.

Legal if no item of one step touches what another item of another step writes. Proved from
`Step.tiled`: every buffer that two steps of a chain name must be touched by each of them tile by
tile, with equal strides. Everything else ends the chain.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsegraph.program import Program, Ref, Step
from sparsegraph.targets.target import Target

_SMALL = 16 << 10  # bytes of weights that never matter: biases, scales


@dataclass(frozen=True)
class Access:
    """How one step touches one buffer.

    Attributes:
        tiles: tiles of one image; 0 if the access is not tile by tile.
        image, tile: elements between images and between tiles.
    """

    tiles: int
    image: int = 0
    tile: int = 0


WHOLE = Access(0)


def form_chains(program: Program, target: Target) -> None:
    """Set `program.chains`, and shrink temporaries that live within one tile of one chain."""
    program.chains = _lengths(program, target)
    _shrink(program)


def _lengths(program: Program, target: Target) -> list[int]:
    """Lengths of the legal and useful chains, in order; their sum is the number of steps."""
    lengths: list[int] = []
    known: dict[str, Access] = {}
    weights: list[int] = []  # bytes of the chain's steps, without small ones
    items = 0
    for step in program.steps:
        own = accesses(program, step)
        heavy = [w for w in (_weight_bytes(program, step),) if w > _SMALL]
        joins = step.items == items > 1 and _agree(known, own)
        joins = joins and _saves(program, known.keys() & own.keys(), target)
        if not joins or (heavy and weights and sum(weights + heavy) > target.l2_bytes // 3):
            lengths.append(0)
            known, weights, items = {}, [], step.items
        lengths[-1] += 1
        known |= own
        weights += heavy
    return lengths


def accesses(program: Program, step: Step) -> dict[str, Access]:
    """How `step` touches each of its buffers, weights aside."""
    args = dict(zip((p.name for p in step.kernel.params), step.args))
    found: dict[str, Access] = {}
    for name, arg in args.items():
        if not isinstance(arg, Ref) or arg.buffer in program.weights:
            continue
        access = WHOLE
        if name in step.tiled:
            image, tile = (_integer(args, f"{name}_{s}") for s in ("image", "tile"))
            access = Access(_integer(args, "tiles"), image, tile)
        if found.setdefault(arg.buffer, access) != access:
            found[arg.buffer] = WHOLE
    return found


def _integer(args: Mapping[str, object], name: str) -> int:
    if name.endswith("_tile") and name not in args:  # tokens: given by the distance of points
        return _integer(args, "block") * _integer(args, name.replace("_tile", "_point"))
    value = args[name]
    assert isinstance(value, int), f"{name}: {value!r}"
    return value


def _agree(known: dict[str, Access], own: dict[str, Access]) -> bool:
    """True if all shared buffers are touched tile by tile alike."""
    return all(known[b] == own[b] != WHOLE for b in known.keys() & own.keys())


def _saves(program: Program, shared: set[str], target: Target) -> bool:
    """True if one of the shared temporaries is too large to stay in the level 2 cache."""
    return any(program.temporaries.get(n, 0) > target.l2_bytes // 2 for n in shared)


def _weight_bytes(program: Program, step: Step) -> int:
    names = {a.buffer for a in step.args if isinstance(a, Ref) and a.buffer in program.weights}
    return sum(program.weights[n].nbytes for n in names)


def _shrink(program: Program) -> None:
    """Keep one tile per thread of every temporary that one chain alone touches."""
    touched = [[accesses(program, program.steps[i]) for i in run] for run in program.runs()]
    uses = Counter(name for chain in touched for name in set().union(*chain))
    for run, chain in zip(program.runs(), touched):
        if len(run) == 1:
            continue
        for name in sorted(set().union(*chain) & program.temporaries.keys()):
            access = next(step[name] for step in chain if name in step)
            is_panel = access.image == access.tiles * access.tile
            is_panel = is_panel and all(_has_strides(program.steps[i], name) for i in run)
            if uses[name] == 1 and access != WHOLE and is_panel:
                n_images = program.steps[run.start].items // access.tiles
                saved = 4 * (n_images * access.image - access.tile)
                program.panels[name] = program.temporaries.pop(name) - saved
                for i in run:
                    program.steps[i] = _on_panel(program.steps[i], name)


def _has_strides(step: Step, buffer: str) -> bool:
    """True if arguments say how far apart all tiles lie; tokens are as far as their points."""
    return _strides(step, buffer) <= {p.name for p in step.kernel.params}


def _on_panel(step: Step, buffer: str) -> Step:
    """The step with every item of `buffer` in the same place."""
    strides, names = _strides(step, buffer), [p.name for p in step.kernel.params]
    return replace(step, args=tuple(0 if n in strides else a for n, a in zip(names, step.args)))


def _strides(step: Step, buffer: str) -> set[str]:
    """Names of the arguments that are distances in the buffer."""
    named = zip((p.name for p in step.kernel.params), step.args)
    mine = [n for n, a in named if isinstance(a, Ref) and a.buffer == buffer]
    return {f"{n}_{s}" for n in mine for s in ("image", "tile")}
