"""Densities that meet a budget at the least predicted loss, and the trade-off as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparsegraph.budget.knapsack import choose
from sparsegraph.budget.table import Option, Table
from sparsegraph.errors import BudgetError, UsageError, message

LATENCY, SIZE, FLOPS = "latency", "size", "flops"
_UNITS = {
    LATENCY: {"ms": 1.0, "us": 1e-3, "s": 1e3},
    SIZE: {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2},
    FLOPS: {"M": 5e5, "G": 5e8, "T": 5e11},  # one multiply-add is two
}
_SHOWN = {LATENCY: ("ms",), SIZE: ("MB", "kB"), FLOPS: ("G", "M")}
N_POINTS = 8  # of the trade-off


@dataclass(frozen=True)
class Budget:
    """At most `limit` of `kind`: milliseconds, bytes or multiply-adds, or a share of the dense
    model's if `is_share`."""

    kind: str
    limit: float
    is_share: bool = False

    @staticmethod
    def parse(kind: str, text: str) -> Budget:
        """Read `5ms`, `4MB`, `1.2G` (FLOP), or `0.5x` of the dense model's.

        Raises UsageError for another form.
        """
        match = re.fullmatch(r"(\d*\.?\d+)\s*([A-Za-z]+)", text.strip())
        units = {**_UNITS[kind], "x": 1.0}
        if match is None or match[2] not in units:
            fix = f"write --{kind} 0.5x"
            raise UsageError(message(f"--{kind}", text, "another form", f"a number and one of "
                                     f"{', '.join(units)}", fix))  # fmt: skip
        return Budget(kind, float(match[1]) * units[match[2]], match[2] == "x")

    def absolute(self, table: Table) -> float:
        """The limit in milliseconds, bytes or multiply-adds."""
        return self.limit * total(table, self.kind, dense(table)) if self.is_share else self.limit


@dataclass(frozen=True)
class Plan:
    """A density for every layer, and what the table predicts of it."""

    densities: Mapping[str, float]
    loss: float
    ms: float
    n_bytes: float
    macs: float
    density: float


def plan(table: Table, budget: Budget) -> Plan:
    """The densities of least predicted loss within the budget.

    Raises BudgetError naming the least that is reachable.
    """
    limit = budget.absolute(table)
    rest = total(table, budget.kind, [])
    costs = [np.array([cost(o, budget.kind) for o in x.options]) for x in table.layers]
    losses = [np.array([o.loss for o in x.options]) for x in table.layers]
    picked = choose(costs, losses, limit - rest)
    if picked is None:
        least = rest + sum(float(c.min()) for c in costs)
        full = total(table, budget.kind, dense(table))
        need = f"at least {_text(budget.kind, least)} ({least / full:.2f}x of dense)"
        fix = "raise the budget, or let the recipe prune more layers"
        found = _text(budget.kind, limit)
        raise BudgetError(message("budget", budget.kind, found, need, fix))
    return described(table, [x.options[i] for x, i in zip(table.layers, picked)])


def least(table: Table, kind: str = LATENCY) -> Plan:
    """The cheapest choice of every layer, whatever it loses."""
    return described(table, [min(x.options, key=lambda o: cost(o, kind)) for x in table.layers])


def pareto(table: Table, kind: str = LATENCY, n: int = N_POINTS) -> list[Plan]:
    """Plans from dense to the least reachable of `kind`, evenly spaced, the dense one first."""
    full = total(table, kind, dense(table))
    rest = total(table, kind, [])
    least = rest + sum(min(cost(o, kind) for o in x.options) for x in table.layers)
    return [plan(table, Budget(kind, float(limit))) for limit in np.linspace(full, least, n)]


def described(table: Table, chosen: list[Option]) -> Plan:
    """A choice of options as a plan."""
    sizes = [x.n_weights for x in table.layers]
    return Plan(
        {x.layer: o.density for x, o in zip(table.layers, chosen)},
        sum(o.loss for o in chosen),
        total(table, LATENCY, chosen),
        total(table, SIZE, chosen),
        total(table, FLOPS, chosen),
        sum(o.density * n for o, n in zip(chosen, sizes)) / max(sum(sizes), 1),
    )


def dense(table: Table) -> list[Option]:
    """The first option of every layer."""
    return [x.options[0] for x in table.layers]


def total(table: Table, kind: str, chosen: list[Option]) -> float:
    """Cost of a choice, with everything that is not chosen from."""
    rest = {LATENCY: table.rest_ms, SIZE: table.rest_bytes, FLOPS: table.rest_macs}[kind]
    return rest + sum(cost(o, kind) for o in chosen)


def cost(option: Option, kind: str) -> float:
    """Milliseconds, bytes or multiply-adds of an option."""
    return {LATENCY: option.ms, SIZE: option.n_bytes, FLOPS: option.macs}[kind]


def _text(kind: str, amount: float) -> str:
    """The amount in the largest unit of which it is at least a tenth."""
    units = [(name, _UNITS[kind][name]) for name in _SHOWN[kind]]
    name, unit = next((u for u in units if amount >= u[1] / 10), units[-1])
    return f"{amount / unit:.3g} {name}"
