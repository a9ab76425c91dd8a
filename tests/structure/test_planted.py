"""Random graphs with planted dead structure: all of it is found, and no output changes."""

import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparsegraph.passes.remove_dead_channels import RemoveDeadChannels

from sparsegraph.rewrite import Fuel
from sparsegraph.verify import Session, compare, feeds_for
from tests.structure.planted import PARTS, kept, planted, proto

TOLERANCE = 2e-5  # float32 sums of a few hundred terms, up to six blocks deep


@settings(
    max_examples=200, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.lists(st.integers(0, len(PARTS) - 1), min_size=1, max_size=6),
)
def test_planted_structure_goes_and_outputs_stay(seed: int, parts: list[int]) -> None:
    model, sites = planted(seed, parts)
    after = model.clone()
    outcome = RemoveDeadChannels().run(after, Fuel())
    onnx.checker.check_model(proto(after), full_check=True)
    feed = feeds_for(model, 2)[1]
    assert compare(Session(after).run(feed), Session(model).run(feed)) <= TOLERANCE
    for site in sites:
        assert kept(after, site) <= site.n_kept, f"{site} keeps {kept(after, site)}"
    assert all(one.reason.split("stay: ")[-1] for one in outcome.declined)
    if any(site.declined and kept(after, site) == site.n for site in sites):
        assert outcome.declined
    again = RemoveDeadChannels().run(after, Fuel())
    assert again.n_applied == 0
