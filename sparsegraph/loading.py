"""Find, check and load the files of an artefact, before anything of them is used.

Needs NumPy and the standard library alone.
"""

import ctypes
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsegraph.errors import ArtefactError, UsageError, message
from sparsegraph.targets import cpu_features

SCHEMA = 2  # version of manifest.json
ABI = 1  # SG_ABI in runtime.h
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
LIBRARY, WEIGHTS, HEADER = "model.so", "weights.bin", "runtime.h"

Array = np.ndarray[Any, Any]

REBUILD = "compile the model again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the artefact in `folder`.

    Raises:
        UsageError: there is no artefact.
        ArtefactError: its text does not match its checksum, or the schema is another one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        found, fix = "no " + MANIFEST, "compile a model, or name its folder"
        raise UsageError(message("artefact", str(folder), found, "a folder with one", fix))
    text = path.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if _read_member(folder / CHECKSUM) != checksum_line(digest):
        found, need = f"SHA-256 {digest[:12]}...", f"that of {CHECKSUM}"
        raise ArtefactError(message("member", str(path), found, need, REBUILD))
    manifest: dict[str, Any] = json.loads(text)
    if manifest["schema"] != SCHEMA or manifest["abi"] != ABI:
        found = f"schema {manifest['schema']}, ABI {manifest['abi']}"
        need = f"schema {SCHEMA}, ABI {ABI}"
        raise ArtefactError(message("artefact", str(folder), found, need, REBUILD))
    return manifest


def checksum_line(digest: str) -> bytes:
    """What `manifest.sha256` holds; `sha256sum -c` reads it."""
    return f"{digest}  {MANIFEST}\n".encode()


def check_machine(target: Mapping[str, Any], name: str) -> None:
    """Refuse a machine that lacks what the code was compiled for.

    Raises:
        ArtefactError: names the missing features.
    """
    machine = platform.machine()
    if target["arch"] != machine:
        fix = f"run it on {target['arch']}, or compile for this machine"
        raise ArtefactError(message("artefact", name, machine, target["arch"], fix))
    have = {_plain(f) for f in cpu_features()}
    missing = [f for f in target["features"] if _plain(f) not in have]
    if missing:
        found = f"a CPU without {', '.join(missing)}"
        fix = "compile with --target native on this machine"
        raise ArtefactError(message("artefact", name, found, target["text"], fix))


def _plain(feature: str) -> str:
    """LLVM writes avx512vnni and sse4.1 where Linux writes avx512_vnni and sse4_1."""
    return feature.replace("_", "").replace(".", "")


class Members:
    """Files of an artefact, checked against the manifest before use."""

    def __init__(self, folder: Path, records: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.records = records
        self.maps = {name: self._open(name) for name in records}

    def mapped(self, name: str) -> Array:
        """The bytes of a member, mapped read-only."""
        return self.maps[name]

    def verified(self, name: str) -> Path:
        """The path of a member."""
        return self.folder / name

    def digest(self, name: str) -> str:
        return str(self.records[name]["sha256"])

    def _open(self, name: str) -> Array:
        path, record = self.folder / name, self.records[name]
        found: object = path.stat().st_size if path.is_file() else "no file"
        if found != record["n_bytes"]:
            found = f"{found} bytes" if isinstance(found, int) else found
            need = f"{record['n_bytes']} bytes"
            raise ArtefactError(message("member", str(path), found, need, REBUILD))
        data = np.memmap(path, np.uint8, "r")
        digest = hashlib.sha256(data.data).hexdigest()
        if digest != record["sha256"]:
            need = f"{record['sha256'][:12]}..."
            found = f"SHA-256 {digest[:12]}..."
            raise ArtefactError(message("member", str(path), found, need, REBUILD))
        return data


def _read_member(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        found = error.strerror or str(error)
        text = message("member", str(path), found, "a readable file", REBUILD)
        raise ArtefactError(text) from error


def load_library(path: Path, digest: str) -> Any:
    """dlopen with the C types of `runtime.h`.

    glibc returns an earlier library for an equal path, even if the file was replaced since. So the
    path is spelled by content: 32 bits of the digest as `/` or `/.` in front of the file name.

    Raises:
        ArtefactError: the system cannot load it, or its ABI is another one.
    """
    bits = f"{int(digest[:8], 16):032b}"
    spelled = (
        f"{path.parent.resolve()}{''.join('/.' if b == '1' else '/' for b in bits)}/{path.name}"
    )
    try:
        library = ctypes.CDLL(spelled)
    except OSError as error:
        text = message("member", str(path), error, "a loadable library", REBUILD)
        raise ArtefactError(text) from error
    if library.sg_abi() != ABI:
        found = f"ABI {library.sg_abi()}"
        raise ArtefactError(message("member", str(path), found, f"ABI {ABI}", REBUILD))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    pointers = ctypes.POINTER(ctypes.c_void_p)
    library.sg_profile.argtypes = [
        number, pointer, pointer, pointers, pointers, pointer, ctypes.POINTER(ctypes.c_double)
    ]  # fmt: skip
    library.sg_workspace_bytes.argtypes = [number, number]
    library.sg_workspace_bytes.restype = ctypes.c_int64
    library.sg_pool_create.argtypes = [number, ctypes.POINTER(pointer)]
    library.sg_pool_destroy.argtypes = [pointer]
    library.sg_pool_destroy.restype = None
    library.sg_status_text.restype = library.sg_missing_feature.restype = ctypes.c_char_p
    return library
