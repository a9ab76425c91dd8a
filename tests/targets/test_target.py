"""Target descriptions: text form, implied features, nearest names."""

import re

import pytest
from sparsegraph.targets.target import PACKAGES, Target, closure

from sparsegraph import targets
from sparsegraph.errors import UnsupportedError

ALL = [pytest.param(t, id=t.name) for t in targets.KNOWN.values()]


@pytest.mark.parametrize("target", ALL)
def test_every_target_parses_and_prints_back(target: Target) -> None:
    assert targets.get(str(target)) == target
    for feature in target.known_features:
        extended = targets.get(f"{target.name}:{feature.name}")
        assert extended.has(feature.name)
        assert targets.get(str(extended)) == extended


@pytest.mark.parametrize("target", ALL)
def test_features_are_closed(target: Target) -> None:
    table = {f.name: f for f in target.known_features}
    assert closure(target.features, table) == set(target.features)
    assert all(implied in table for f in target.known_features for implied in f.implies)


@pytest.mark.parametrize("target", ALL)
def test_numbers_fit_together(target: Target) -> None:
    assert target.lanes in (1, 4, 8, 16)
    assert target.n_registers in (8, 15, 16, 32)  # 15: pairs, without that of the mask register
    assert target.l1_bytes < target.l2_bytes
    assert all(tool in PACKAGES for tool in (*target.linker, *target.emulator[:1]))


def test_implied_features_are_listed() -> None:
    assert str(targets.get("x86-64-v3:avx512vnni")) == "x86-64-v3:avx512f,avx512vnni"
    assert str(targets.get("aarch64:sve2")) == "aarch64:fullfp16,sve,sve2"
    assert str(targets.get("x86-64-v4:avx2")) == "x86-64-v4"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("rasberry-pi-5", "write raspberry-pi-5"),
        ("x86-64-v3:avx512vnmi", "write avx512vnni"),
        ("riscv64:v", "take one that riscv64 has"),
        ("qqq", "take one that the table has"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(text: str, fix: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(f"Fix: {fix}")):
        targets.get(text)


def test_a_missing_extra_feature_is_not_native() -> None:
    here = targets.native()
    assert targets.runs_here(here)
    table = {f.name: f for f in here.known_features}
    for name in table:
        missing = closure([name], table) - targets.cpu_features()
        assert targets.runs_here(here.with_features([name])) == (not missing)
