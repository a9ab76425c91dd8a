"""30 % of every group at random: the cut model equals the masked one, on every topology."""

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks import real_models, zoo
from benchmarks.zoo.light import light
from sparsegraph.capture import load
from sparsegraph.pipeline import optimize
from sparsegraph.sigmoid import disagreement
from sparsegraph.structure import cut, mask
from sparsegraph.structure.groups import Group, groups
from sparsegraph.structure.ties import Analysis, Policy, analyse
from sparsegraph.verify import Session, compare, feeds_for
from tests.structure.topologies import ALL

SHARE = 0.3
BOUND = 1e-5
SECONDS = 1.0

# units and groups, where they are known from counting the layers
COUNTS = {
    "resnet18": (2880, 12), "resnet50": (11456, 37), "mobilenet_v2": (9128, 25),
    "efficientnet_lite0": (11024, 24), "minilm": (3096, 4), "deit_tiny": (9252, 24),
    "light_densenet121": (10240, 120), "light_inception_v1": (7024, 55),
    "light_squeezenet": (2944, 25), "vgg": (104, 6), "gqa": (50, 2), "windows": (51, 2),
    "lstm": (32, 3), "ppocr_v6_det": (5712, 41),
}  # fmt: skip
ZOO = ("resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0", "yolov8n",
       "minilm", "deit_tiny", "digits_cnn")  # fmt: skip
SMALL = {
    **{name: {"size": 64} for name in ZOO[:5]},
    "yolov8n": {"size": 160},
    "minilm": {"sequence": 16, "layers": 2},
}
LIGHTS = ("light_densenet121", "light_inception_v1", "light_squeezenet", "light_shufflenet")


def model_of(name: str) -> ir.Model:
    """A model by name; real ones need their package."""
    if name in ALL:
        return load(ALL[name]())
    if name in ZOO:
        return load(zoo.build(name, **SMALL.get(name, {})))
    if name in LIGHTS:  # their weights pass through Reshape and Unsqueeze
        return optimize(
            load(light(name.removeprefix("light_"))), verify=False, stop_after="remove_identity"
        ).model
    try:
        return load(real_models.load(name))
    except real_models.MissingPackage as error:
        pytest.skip(str(error))


def some_of(analysis: Analysis, found: list[Group]) -> np.ndarray:
    """Marks on 30 % of the units of every group, at least one."""
    rng = np.random.default_rng(0)
    gone = np.zeros(analysis.ties.forest.n, np.bool_)
    for group in found:
        n = max(1, int(SHARE * len(group.roots)))
        gone[rng.permutation(group.roots)[:n]] = True
    return cut.fill_empty(analysis, gone)


def check(model: ir.Model, policy: Policy, bound: float) -> tuple[int, int]:
    """Cut against mask; returns units and groups."""
    start = time.process_time()
    analysis = analyse(model, policy)
    found = groups(analysis)
    assert time.process_time() - start <= SECONDS
    gone = some_of(analysis, found)
    masked, smaller = model.clone(), model.clone()
    mask.apply(analyse(masked, policy), gone)
    cut.apply(analyse(smaller, policy), gone)
    onnx.checker.check_model(ir.to_proto(smaller), full_check=True)
    feed = feeds_for(model, 2)[1]
    want = Session(masked).run(feed)
    got = Session(smaller).run(feed)
    assert disagreement(feed, bound, smaller, masked, compare(got, want)) <= bound
    if found:
        assert weights(smaller) < weights(model)
        assert compare(want, Session(model).run(feed)) > bound, "the mask changed nothing"
    return sum(len(group.roots) for group in found), len(found)


def weights(model: ir.Model) -> int:
    return sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value)


@pytest.mark.parametrize("name", [*ALL, *ZOO, *LIGHTS])
def test_cut_equals_mask(name: str) -> None:
    policy = Policy(grouped="within" if "shufflenet" in name else "whole")
    counts = check(model_of(name), policy, BOUND)
    assert counts[1] > 0
    if name in COUNTS:
        assert counts == COUNTS[name]


@pytest.mark.parametrize("name", [*ALL, "deit_tiny", "minilm"])
def test_cut_equals_mask_after_the_passes(name: str) -> None:
    policy = Policy(grouped="within" if "shufflenet" in name else "whole")
    assert check(optimize(model_of(name), verify=False).model, policy, BOUND)[1] > 0


@pytest.mark.parametrize("name", [n for n in real_models.MODELS if n.startswith("ppocr")])
def test_cut_equals_mask_on_trained_models(name: str) -> None:
    counts = check(model_of(name), Policy(), BOUND)
    if name in COUNTS:
        assert counts == COUNTS[name]


@pytest.mark.parametrize("name", ["shufflenet_v1", "light_shufflenet"])
def test_whole_groups_of_shufflenet_are_one_set(name: str) -> None:
    check(model_of(name), Policy(grouped="whole"), BOUND)
