"""Nodes that only move elements."""

from sparsegraph.lower.builder import Builder, Declined, Stored


def copy_flat(b: Builder, source: Stored, to: Stored) -> None:
    raise Declined("no copy yet")


def copy_permuted(b, stored, perm, result) -> None:
    raise Declined("no transpose yet")
