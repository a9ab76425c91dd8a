"""Sigmoids that keep their relative precision: ONNX Runtime's own is right to 1e-7 of one only.

    y = Sigmoid(x)    ->    y = Div(1, Add(1, Exp(Neg(x))))

Its kernel adds a rational function to 0.5, so a probability of 1e-5 has two digits. A detector that
sees nothing makes nothing larger, and two models that are equal to 3e-15 in float64 come out 1e-3
of their largest output apart; with Sigmoids written out, 4e-6. Where that alone decides whether two
models agree, they are compared like this.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sparsegraph.graph import all_names, is_op
from sparsegraph.rewrite import Builder
from sparsegraph.verify import Feed, Outputs, Session, compare

Run = Callable[[Feed], Outputs]


def disagreement(feed: Feed, limit: float, a: ir.Model | Run, b: ir.Model, error: float) -> float:
    """`error`, or where it is above the limit the distance with float32 Sigmoids written out.

    `b` is the reference, `a` another model or what runs it by other kernels. Both forms are the
    models as ONNX defines them: only how ONNX Runtime rounds differs.
    """
    if error <= limit or not any(map(_is_coarse, b.graph)):
        return error
    run = Session(written_out(a)).run if isinstance(a, ir.Model) else a
    return min(error, compare(run(feed), Session(written_out(b)).run(feed)))


def written_out(model: ir.Model) -> ir.Model:
    """A copy whose float32 Sigmoids, those outside of subgraphs, are exponentials."""
    model = model.clone()
    graph = model.graph
    build = Builder(graph, all_names(graph), "sigmoid")
    one = build.constant(np.array(1, np.float32), "one")
    graph.register_initializer(one)
    for node in [node for node in graph if _is_coarse(node)]:
        build.nodes.clear()
        out = node.outputs[0]
        power = build.op("Exp", [build.op("Neg", [node.inputs[0]], like=out)], like=out)
        quotient = build.op("Div", [one, build.op("Add", [one, power], like=out)], like=out)
        graph.insert_before(node, build.nodes)
        out.replace_all_uses_with(quotient, replace_graph_outputs=True)
        name = str(out.name)
        graph.remove(node, safe=True)
        quotient.name = name
    return model


def _is_coarse(node: ir.Node) -> bool:
    return is_op(node, "Sigmoid") and node.outputs[0].dtype == ir.DataType.FLOAT
