"""What a user is told when a C compiler is missing, has no C library, or fails."""

import os
from pathlib import Path

import pytest
from sparsegraph.targets import link

from sparsegraph import targets
from sparsegraph.errors import UnsupportedError
from tests.targets import cross

COMPILER = "aarch64-linux-gnu-gcc"
NO_HEADER = "/usr/include/stdint.h:26:10: fatal error: bits/libc-header-start.h: No such file"


def build(folder: Path, says: str) -> str:
    """The error of a compiler that fails with `says`."""
    script = folder / COMPILER
    script.write_text(f"#!/bin/sh\necho '{says} or directory' >&2\nexit 1\n")
    script.chmod(0o755)
    source = folder / "m.c"
    source.write_text("int sg;\n")
    with pytest.raises(UnsupportedError) as caught:
        link.shared_library([], [source], targets.get("aarch64"), folder / "m.so")
    assert not (folder / "m.so").exists()
    return str(caught.value)


def test_a_compiler_without_its_c_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    text = build(tmp_path, NO_HEADER)
    with pytest.raises(pytest.skip.Exception, match="libc6-dev-arm64-cross"):
        cross.require(COMPILER)
    assert "bits/libc-header-start.h" in text
    assert "install the Debian packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross" in text
    text = build(tmp_path, "m.c:1:1: error: expected a declaration")
    assert "report this" in text
    assert "install" not in text


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(link, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"):
        link.driver(targets.get("aarch64"))
