"""Write an Einsum of two operands as a MatMul, or as a product and a sum; of one as a transpose.

    y = Einsum<equation="bqhd,bkhd->bhqk">(q, k)
        ->  a = Transpose(q); b = Transpose(k); y = MatMul(a, b)        (a: [b,h,q,d], b: [b,h,d,k])

A constant operand goes to the right, where it is the weight of a layer; its transposition is folded
later. Labels that only one operand has, and not the result, are summed first. Where no label is
summed over both operands, or no other is left to one of them alone, Mul and ReduceSum do.

An ellipsis is spelled out first.

Declines when: there are more operands, the equation has a label twice in a term, one label has
two sizes (an ellipsis that is broadcast), a shape is unknown, or the numbers are no floats.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import FLOAT_DTYPES, attribute, is_constant, is_op, static_shape
from sparsegraph.rewrite import Builder, Decline, RewritePass, decline


@dataclass(frozen=True)
class Term:
    """An operand and its labels, one letter per axis."""

    value: ir.Value
    labels: str


@dataclass(frozen=True)
class Found:
    """One term or two, the labels of the result, and the size of every label."""

    left: Term
    right: Term | None
    result: str
    sizes: dict[str, int]


@dataclass(frozen=True)
class ExpandEinsum(RewritePass):
    """Products of two tensors in the form that later passes and kernels know."""

    name: ClassVar[str] = "expand_einsum"

    def match(self, node: ir.Node, graph: ir.Graph) -> Found | Decline | None:
        """An Einsum of two terms of known sizes."""
        if not is_op(node, "Einsum"):
            return None
        equation = str(attribute(node, "equation", "")).replace(" ", "")
        operands, arrow, result = equation.partition("->")
        labels = operands.split(",")
        if len(labels) not in (1, 2) or len(node.inputs) != len(labels):
            return decline(node, f"{len(node.inputs)} operands, more than 2")
        shapes = [static_shape(v) for v in node.inputs]
        if not arrow:
            named = Counter(operands.replace(".", "").replace(",", ""))
            once = "".join(sorted(label for label, n in named.items() if n == 1))
            result = "..." * ("..." in operands) + once
        *labels, result = _spelled_out([*labels, result], shapes)
        if any(len(set(one)) < len(one) for one in (*labels, result)):
            return decline(node, f"equation {equation}: a repeated label")
        sizes: dict[str, int] = {}
        for term, shape in zip(labels, shapes, strict=True):
            if shape is None or len(shape) != len(term):
                return decline(node, "a shape is unknown")
            for label, size in zip(term, shape, strict=True):
                if sizes.setdefault(label, size) != size:
                    return decline(node, f"label {label} has sizes {sizes[label]} and {size}")
        values = [value for value in node.inputs if value is not None]
        if any(value.dtype not in FLOAT_DTYPES for value in values):
            return decline(node, "the numbers are no floats")
        terms = [Term(value, term) for value, term in zip(values, labels, strict=True)]
        terms.sort(key=lambda term: is_constant(term.value))
        return Found(terms[0], terms[1] if len(terms) > 1 else None, result, sizes)

    def rewrite(self, found: Found, build: Builder) -> Sequence[ir.Value]:
        """Sort the labels, multiply, sort them back."""
        job = _Job(found, build)
        if found.right is None:
            gone = "".join(c for c in found.left.labels if c not in found.result)
            y = job.turned(job.reduced(found.left, gone) if gone else found.left, found.result)
            return [build.op("Identity", [y], like=y) if y is found.left.value else y]
        left, right = job.summed(found.left, found.right), job.summed(found.right, found.left)
        both = [c for c in left.labels if c in right.labels]
        batch = "".join(c for c in found.result if c in both)
        inner = "".join(c for c in both if c not in found.result)
        rows = "".join(c for c in found.result if c in left.labels and c not in right.labels)
        columns = "".join(c for c in found.result if c in right.labels and c not in left.labels)
        if inner and (rows or columns):
            made = job.matrices(left, right, batch, rows, columns, inner)
        else:
            made = job.elementwise(left, right, batch + rows + columns, inner)
        return [job.turned(made, found.result)]


def _spelled_out(terms: list[str], shapes: Sequence[Sequence[int] | None]) -> list[str]:
    """The terms with an unused letter per axis of an ellipsis, of which ONNX gives each as many."""
    spare = [c for c in string.ascii_letters if not any(c in term for term in terms)]
    pairs = ((t, s) for t, s in zip(terms, shapes) if s is not None and "..." in t)
    n = max((len(shape) - len(term) + len("...") for term, shape in pairs), default=0)
    return [term.replace("...", "".join(spare[:n])) for term in terms]


@dataclass(frozen=True)
class _Job:
    found: Found
    build: Builder

    def summed(self, term: Term, other: Term) -> Term:
        """The term without labels that nothing else has."""
        alone = [c for c in term.labels if c not in other.labels and c not in self.found.result]
        return self.reduced(term, "".join(alone)) if alone else term

    def reduced(self, term: Term, gone: str) -> Term:
        """Summed over some labels."""
        left = "".join(c for c in term.labels if c not in gone)
        axes = np.array([term.labels.index(c) for c in gone], np.int64)
        operand = self.build.constant(axes, f"{self.build.hint}_axes")
        inputs = [term.value, operand]
        value = self.build.op(
            "ReduceSum", inputs, {"keepdims": 0}, like=term.value, shape=self.shape(left)
        )
        return Term(value, left)

    def matrices(
        self, left: Term, right: Term, batch: str, rows: str, columns: str, inner: str
    ) -> Term:
        """MatMul of [batch, rows, inner] and [batch, inner, columns]."""
        groups = [*batch, rows, inner]
        if not batch and rows:
            groups = [*rows, inner]  # beside one matrix any number of leading axes will do
        a = self.grouped(left, groups)
        b = self.grouped(right, [*batch, inner, columns])
        shape = (*self.sizes(groups[:-1]), *self.sizes([columns]))
        value = self.build.op("MatMul", [a, b], like=left.value, shape=shape)
        labels = batch + rows + columns
        return Term(self.reshaped(value, shape, self.shape(labels)), labels)

    def elementwise(self, left: Term, right: Term, order: str, inner: str) -> Term:
        """Mul over all labels, then the sum over the inner ones."""
        labels = order + inner
        a, b = (
            self.grouped(t, [c if c in t.labels else "" for c in labels]) for t in (left, right)
        )
        value = self.build.op("Mul", [a, b], like=left.value, shape=self.shape(labels))
        return self.reduced(Term(value, labels), inner) if inner else Term(value, labels)

    def grouped(self, term: Term, groups: Sequence[str]) -> ir.Value:
        """The term with one axis per group of labels, in this order; "" is an axis of one."""
        order = "".join(groups)
        turned = self.turned(term, order)
        return self.reshaped(turned, self.shape(order), self.sizes(groups))

    def turned(self, term: Term, order: str) -> ir.Value:
        """The term with its labels in this order."""
        if term.labels == order:
            return term.value
        perm = [term.labels.index(c) for c in order]
        shape = self.shape(order)
        return self.build.op(
            "Transpose", [term.value], {"perm": perm}, like=term.value, shape=shape
        )

    def reshaped(
        self, value: ir.Value, before: tuple[int, ...], after: tuple[int, ...]
    ) -> ir.Value:
        if before == after:
            return value
        shape = self.build.constant(np.array(after, np.int64), f"{self.build.hint}_shape")
        return self.build.op("Reshape", [value, shape], like=value, shape=after)

    def sizes(self, groups: Sequence[str]) -> tuple[int, ...]:
        """Elements of every group."""
        return tuple(int(np.prod(self.shape(g), dtype=np.int64)) for g in groups)

    def shape(self, labels: str) -> tuple[int, ...]:
        return tuple(self.found.sizes[c] for c in labels)
