"""Criteria that need gradients: from a torch module, or from runs alone."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from sparsegraph import capture
from sparsegraph.errors import UsageError
from sparsegraph.gradients import Gradient, of_module
from sparsegraph.layers import weighted
from sparsegraph.pipeline import optimize
from sparsegraph.probe import output_slopes
from sparsegraph.prune import prune
from sparsegraph.sensitivity import scan
from tests.passes.check import parse, weight
from tests.test_budget import encoder
from tests.test_prune import feeds

torch = pytest.importorskip("torch")

N, IN, HIDDEN, OUT = 64, 24, 32, 6


def job(seed: int = 0) -> tuple[object, object, object]:
    """A module of which half the hidden units hardly count, inputs, and labels."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Linear(IN, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUT)
    )
    with torch.no_grad():
        module[2].weight[:, ::2] *= 0.01
    x = torch.randn(N, IN)
    return module, x, module(x).argmax(dim=1)


def loss_of(labels: object) -> Callable[[object, int], object]:
    return lambda output, i: torch.nn.functional.cross_entropy(output, labels[i : i + 1])


def gradients(**options: object) -> tuple[ir.Model, dict[str, Gradient], list[dict]]:
    module, x, labels = job()
    items = [(row[None],) for row in x]
    found = of_module(module, items, loss_of(labels) if options.get("loss") else None)
    model = capture(module, (x[:1],))
    name = str(model.graph.inputs[0].name)
    return model, found, [{name: row[None].numpy()} for row in x]


def test_gradients_are_those_of_autograd() -> None:
    module, x, labels = job()
    found = of_module(module, [(x,)], lambda y, i: torch.nn.functional.cross_entropy(y, labels))
    torch.nn.functional.cross_entropy(module(x), labels).backward()
    want = module[0].weight.grad.numpy()
    np.testing.assert_allclose(found["0.weight"].square, want**2, rtol=1e-5, atol=1e-12)
    assert found["0.weight"].of_loss
    with pytest.raises(UsageError, match="inputs"):
        of_module(module, [])


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_a_module_tells_which_units_count(method: str) -> None:
    model, found, _ = gradients(loss=True)
    pruned = prune(model, f"{method}:0.5,layers=0.weight", gradients=found)
    layer = next(x for x in weighted(pruned.model) if x.value.name == "0.weight")
    density = (layer.matrix() != 0).mean(axis=1)
    assert density[1::2].mean() > 3 * density[::2].mean()
    assert pruned.density == pytest.approx(0.5, abs=0.01)


def test_what_minibatches_ask_for_does_not_cancel() -> None:
    """Units that two minibatches pull in opposite directions count more than those at rest."""
    module, x, _ = job()
    half = OUT // 2
    found = of_module(
        module, [(x,), (x,)], lambda y, i: (-1) ** i * y[:, :half].sum() + 1e-3 * y[:, half:].sum()
    )
    model = capture(module, (x[:1],))
    pruned = prune(model, "taylor:0.5,layers=2.weight", gradients=found)
    layer = next(x for x in weighted(pruned.model) if x.value.name == "2.weight")
    density = (layer.matrix() != 0).mean(axis=1)
    assert density[:half].mean() > 2 * density[half:].mean()


def test_a_square_weight_that_was_turned() -> None:
    """The shape does not tell; the parameter beside its gradients does."""
    torch.manual_seed(1)
    module, x = torch.nn.Sequential(torch.nn.Linear(IN, IN), torch.nn.Tanh()), torch.randn(2, 4, IN)
    found = of_module(module, [(x,)], lambda y, i: (y**2).sum())
    model = optimize(capture(module, (x,))).model
    (layer,) = weighted(prune(model, "taylor:0.5", gradients=found).model)
    assert layer.node.op_type == "MatMul"
    score = np.square(module[0].weight.detach().numpy()) * found["0.weight"].square
    np.testing.assert_array_equal(layer.matrix() != 0, score >= np.median(score))
    alone = {name: Gradient(one.square, one.of_loss) for name, one in found.items()}
    with pytest.raises(UsageError, match="the parameter too"):
        prune(model, "taylor:0.5", gradients=alone)


def test_runs_alone_tell_it_too() -> None:
    model, found, calibration = gradients()
    pruned = prune(model, "fisher:0.5,layers=0.weight", calibration)
    layer = next(x for x in weighted(pruned.model) if x.value.name == "0.weight")
    density = (layer.matrix() != 0).mean(axis=1)
    assert density[1::2].mean() > 3 * density[::2].mean()
    by_torch = found["0.weight"].square.mean(axis=1)
    by_runs = output_slopes(model, weighted(model), calibration[:8])[layer.name].ravel()
    assert np.corrcoef(by_torch, by_runs)[0, 1] > 0.9


def test_probes_leave_the_model_alone() -> None:
    model = encoder()
    before = ir.to_proto(model).SerializeToString()
    found = output_slopes(model, weighted(model), feeds(2))
    assert ir.to_proto(model).SerializeToString() == before
    assert {name: x.shape for name, x in found.items()} == {
        "up": (1, 96), "down": (1, 48), "head": (1, 48)
    }  # fmt: skip
    again = output_slopes(model, weighted(model), feeds(2))
    np.testing.assert_array_equal(found["up"], again["up"])


def test_a_stack_of_weights_is_probed_one_by_one() -> None:
    text = """g (float[3,5,8] x) => (float[3,5,2] y) {
        h = MatMul(x, e)  r = Tanh(h)  y = MatMul(r, o) }"""
    e, o = weight(3, 8, 16), weight(3, 16, 2)
    o[1] *= 0.01
    model = parse(text, e=e, o=o)
    (layer, _) = weighted(model)
    found = output_slopes(model, [layer], [{"x": weight(3, 5, 8)}])[layer.name].reshape(3, 16)
    assert found[1].mean() < 0.5 * found[[0, 2]].mean()


def test_what_is_missing_is_said() -> None:
    model, found, calibration = gradients()
    for recipe, given, text in (
        ("taylor:0.5", None, "no gradients"),
        ("taylor:0.5", found, "found none, need gradients of a loss of"),
        ("relevance:0.5", found, "found none, need relevance of"),
        ("relevance:0.5", None, "no gradients, need relevance"),
        ("fisher:0.5", {}, "found none, need gradients of"),
    ):
        with pytest.raises(UsageError, match=text):
            prune(model, recipe, calibration, gradients=given)
    with pytest.raises(UsageError, match="no feeds"):
        prune(model, "fisher:0.5")
    wrong = {name: Gradient(np.ones((3, 5))) for name in found}
    with pytest.raises(UsageError, match=r"found \[3, 5\]"):
        prune(model, "fisher:0.5", gradients=wrong)


def test_a_scan_by_fisher() -> None:
    assert {row.layer for row in scan(encoder(), "fisher:0.5", feeds(4))} == {"up", "down", "head"}
