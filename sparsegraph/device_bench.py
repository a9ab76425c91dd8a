"""Times a bundle on the devices of an inventory: all machines at once, each in its own time.

The bundle's `bench.c` is linked here for the machine that the bundle is for, copied with library
and weights, run, and its JSON brought back. A device that does not answer is a row with the reason.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from sparsegraph import loading, targets
from sparsegraph.devices import Device, DeviceError, plain
from sparsegraph.errors import SparsegraphError, UnsupportedError, UsageError, message
from sparsegraph.progress import Progress, silent
from sparsegraph.targets import bundle, link
from sparsegraph.targets.target import Target

_PROGRAM = "bench"


@dataclass(frozen=True)
class DeviceTime:
    """What one device measured; milliseconds are None where it has not.

    Attributes:
        steps: (nodes, milliseconds) of every kernel call of the median run.
        attempts: runs of its commands until one succeeded, or all of them.
    """

    device: str
    target: str
    threads: int
    repeats: int
    attempts: int
    median_ms: float | None = None
    min_ms: float | None = None
    steps: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    @property
    def slowest(self) -> str:
        """The nodes of the slowest kernel call, and its time."""
        if not self.steps:
            return ""
        nodes, ms = max(self.steps, key=lambda step: step[1])
        return f"{nodes}: {ms:.3g} ms"


@dataclass(frozen=True)
class DeviceBench:
    """A bundle on several devices."""

    artefact: str
    model_sha256: str
    target: str
    times: tuple[DeviceTime, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything above as plain data."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows, in the order of the inventory."""
        columns = ["device", "target", "threads", "median ms", "fastest ms", "attempts", "slowest"]
        rows: list[list[object]] = [
            [t.device, t.target, t.threads, t.median_ms, t.min_ms, t.attempts, t.error or t.slowest]
            for t in self.times
        ]
        return columns, rows

    @property
    def errors(self) -> list[str]:
        return [t.error for t in self.times if t.error]


def bench(path: Path, devices: Sequence[Device], progress: Progress | None = None) -> DeviceBench:
    """Time the bundle `path` on all devices.

    Raises:
        UsageError: `path` is no bundle with a library.
        UnsupportedError: there is no C compiler for its target.
    """
    report = progress or silent
    manifest = loading.read_manifest(path)
    text = str(manifest["target"]["text"])
    if not (path / bundle.LIBRARY).is_file() or any(path.glob("fallback_*.onnx")):
        need = "a bundle whose library runs the whole model"
        fix = "compile it with --target NAME of a machine with an operating system"
        raise UsageError(message("artefact", str(path), f"one for {text}", need, fix))
    target = targets.get(text)
    with tempfile.TemporaryDirectory() as temporary:
        files = _files(path, target, Path(temporary))
        n_steps = sum(len(segment.get("steps", ())) for segment in manifest["segments"])
        found: dict[str, DeviceTime] = {}
        report("devices", 0, len(devices))
        with ThreadPoolExecutor(len(devices)) as pool:
            turns = {device.place: Lock() for device in devices}
            jobs = [pool.submit(_time, d, target, files, n_steps, turns[d.place]) for d in devices]
            for job in as_completed(jobs):
                found[job.result().device] = job.result()
                report("devices", len(found), len(devices))
    times = tuple(found[d.name] for d in devices)
    return DeviceBench(path.name, str(manifest["model_sha256"]), text, times)


def _files(path: Path, target: Target, folder: Path) -> list[Path]:
    """Program, library and weights side by side."""
    for name in (bundle.LIBRARY, loading.WEIGHTS):
        try:
            os.link(path / name, folder / name)
        except OSError:
            shutil.copyfile(path / name, folder / name)
    link.program(path / "bench.c", path / bundle.LIBRARY, target, folder / _PROGRAM)
    return [folder / _PROGRAM, folder / bundle.LIBRARY, folder / loading.WEIGHTS]


def _time(
    device: Device, target: Target, files: Sequence[Path], n_steps: int, turn: Lock
) -> DeviceTime:
    """One device, as often as it takes, while nothing else is timed there; never raises."""
    blank = DeviceTime(device.name, device.target or str(target), device.threads, device.repeats, 0)
    try:
        _check(device, target)
    except SparsegraphError as error:
        return replace(blank, attempts=0, error=str(error))
    failure = DeviceError("", "")
    for attempt in range(1, device.retries + 2):
        try:
            with turn:
                return replace(blank, attempts=attempt, **_result(device, files, n_steps))
        except DeviceError as error:
            failure = error
            if attempt <= device.retries:
                time.sleep(attempt * device.wait_s)
    tried = f"{failure.found} ({device.retries + 1} attempts)"
    text = message("device", device.name, tried, "the bundle's timing", failure.fix)
    return replace(blank, attempts=device.retries + 1, error=text)


def _check(device: Device, target: Target) -> None:
    """Refuse a device that the bundle is not for.

    Raises:
        UnsupportedError: names the device and the target to compile for.
    """
    if not device.target:
        return
    own = targets.get(device.target)
    lacks = sorted(targets.features(target) - targets.features(own))
    if own.triple != target.triple or lacks:
        found = f"{own}, which lacks {', '.join(lacks)}" if own.triple == target.triple else own
        need = f"a machine that runs code for {target}"
        fix = f"compile the model with --target {own}"
        raise UnsupportedError(message("device", device.name, found, need, fix))


def _result(device: Device, files: Sequence[Path], n_steps: int) -> dict[str, Any]:
    """Copy, run, read.

    Raises:
        DeviceError: a command failed, or what it printed is no timing.
    """
    for command in device.copying(files):
        device.execute(command)
    program, _, weights = [str(f) if device.is_here else f"{device.folder}/{f.name}" for f in files]
    arguments = (weights, str(device.threads), str(device.repeats))
    out = device.execute(device.command(program, *arguments))
    try:
        return _timing(out.strip().splitlines()[-1], n_steps)
    except (IndexError, KeyError, TypeError, ArithmeticError, ValueError, RecursionError) as error:
        found = f"no timing but '{plain(out.strip()[-100:])}'"
        fix = f"run `{' '.join(device.command(program, *arguments))}` by hand"
        raise DeviceError(found, fix) from error


def _timing(text: str, n_steps: int) -> dict[str, Any]:
    """Median, minimum and steps of a line of `bench.c`.

    Raises:
        ValueError, KeyError, TypeError, ArithmeticError, RecursionError: it is none of this bundle.
    """
    data = json.loads(text)
    steps = tuple((plain(str(s["nodes"])), float(s["ms"])) for s in data["steps"])
    median, least = float(data["median_ms"]), float(data["min_ms"])
    times = (least, median, *(ms for _, ms in steps))
    if len(steps) != n_steps or least > median:
        raise ValueError("the timing of another bundle")
    if not all(math.isfinite(ms) and ms >= 0 for ms in times):
        raise ValueError("a time that is none")
    return {"median_ms": median, "min_ms": least, "steps": steps}
