"""The inventory: devices in a TOML file, and how a command runs on one of them.

    [defaults]                       # optional; what every device takes unless it says otherwise
    timeout_s = 60

    [devices.kitchen]
    target = "raspberry-pi-5"
    ssh = "pi@kitchen"               # keys and ports: ~/.ssh/config

    [devices.phone]                  # any other way: two commands
    push = ["adb", "push", "{files}", "{folder}"]
    run = ["adb", "shell", "{command}"]
    folder = "/data/local/tmp/sparsegraph"

    [devices.emulated]               # without `push` the files stay here
    run = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "{words}"]

`{files}` and `{words}` stand for several words, `{command}` for one text that a shell reads.
"""

from __future__ import annotations

import math
import os
import selectors
import shlex
import signal
import subprocess
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparsegraph.errors import UsageError, message
from sparsegraph.targets.target import PACKAGES

_CONNECT_S = 10
_SSH = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}")
_ROOM = 'mkdir -p "$0" && cd "$0" && rm -f "$@"'  # no file that still runs is overwritten
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.@:\[\]-]*"
_FOLDER = r"[A-Za-z0-9_/][A-Za-z0-9_./-]*"
_NAME = r"[^\x00-\x1f\x7f-\x9f]{1,100}"
_FILE_BYTES = 1 << 20  # of an inventory
_OUTPUT_BYTES = 8 << 20  # of what a command prints; a timing takes 100 bytes a kernel
_DEVICES = 256  # one thread each
_DAY_S = 86400.0

Seconds = Annotated[float, Field(strict=True, le=_DAY_S, allow_inf_nan=False)]

Words = tuple[str, ...]


class DeviceError(Exception):
    """A command of a device failed; `found` and `fix` are parts of the error text."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.found = found
        self.fix = fix


class Device(BaseModel):
    """One machine that measures.

    Attributes:
        target: what it is, as `sparsegraph targets` spells it; empty: whatever the bundle is for.
        ssh: host of OpenSSH's `ssh` and `scp`; or
        run, push: commands that run a program on it, and copy files to it.
        folder: where the files go on the device.
        timeout_s: of one command.
        retries: further attempts after one that failed.
        wait_s: before the first of them; each waits longer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=rf"^{_NAME}$")]
    target: str = ""
    ssh: Annotated[str, Field(pattern=rf"^({_HOST})?$")] = ""
    run: Words = ()
    push: Words = ()
    folder: Annotated[str, Field(pattern=rf"^{_FOLDER}$")] = "sparsegraph-bench"
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    repeats: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 20
    timeout_s: Annotated[Seconds, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(strict=True, ge=0, le=100)] = 2
    wait_s: Annotated[Seconds, Field(ge=0)] = 1.0

    @field_validator("run", "push")
    @classmethod
    def _can_be_run(cls, words: Words) -> Words:
        if words and (not words[0] or any("\0" in w for w in words)):
            raise ValueError("an empty command, or a zero byte in one")
        return words

    @field_validator("run")
    @classmethod
    def _runs_something(cls, words: Words) -> Words:
        if words and not ("{words}" in words or any("{command}" in w for w in words)):
            raise ValueError("no word {words} or {command}")
        return words

    @field_validator("push")
    @classmethod
    def _pushes_something(cls, words: Words) -> Words:
        if words and "{files}" not in words:
            raise ValueError("no word {files}")
        return words

    @model_validator(mode="after")
    def _one_way(self) -> Device:
        if bool(self.ssh) == bool(self.run):
            raise ValueError("need either ssh or run")
        if self.ssh and self.push:
            raise ValueError("ssh brings its own push")
        return self

    @property
    def is_here(self) -> bool:
        """True if files stay where they are, as for an emulator."""
        return not self.ssh and not self.push

    @property
    def place(self) -> str:
        """Where it measures: devices of one place take turns."""
        return self.ssh or self.name

    def copying(self, files: Sequence[Path]) -> list[Words]:
        """The commands that bring `files` to the device."""
        if self.is_here:
            return []
        names = [str(f) for f in files]
        if self.ssh:
            to = f"{self.ssh}:{self.folder}/"
            room = self.command("sh", "-c", _ROOM, self.folder, *(f.name for f in files))
            return [room, ("scp", "-q", *_SSH, *names, to)]
        return [tuple(_filled(self.push, "{files}", names, {"{folder}": self.folder}))]

    def command(self, *words: str) -> Words:
        """The command that runs `words` on the device."""
        if self.ssh:  # what is stopped here would go on there
            limited = ("timeout", str(math.ceil(self.timeout_s)), *words)
            return ("ssh", *_SSH, self.ssh, shlex.join(limited))
        text = shlex.join(words)
        return tuple(_filled(self.run, "{words}", words, {"{command}": text}))

    def execute(self, command: Sequence[str]) -> str:
        """What the command prints.

        Raises:
            DeviceError: it is missing, fails, prints without end, or takes longer than `timeout_s`.
        """
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            package = PACKAGES.get(command[0], "")
            fix = f"install the Debian package {package}" if package else "install it, or name it"
            found = f"{command[0]}: {error.strerror}"
            raise DeviceError(found, f"{fix} in [devices.{self.name}]") from error
        with process:
            try:
                out, err = self._output(process)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode:
            said = plain((err.strip() or out.strip() or "nothing").splitlines()[-1][-300:])
            raise DeviceError(f"exit code {process.returncode}: {said}", self._trial())
        return out

    def _output(self, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """What it writes until its end.

        Raises:
            DeviceError: too much of it, or it takes too long.
        """
        end = time.monotonic() + self.timeout_s
        found = {stream: bytearray() for stream in (process.stdout, process.stderr) if stream}
        with selectors.DefaultSelector() as waiting:
            for stream in found:
                waiting.register(stream, selectors.EVENT_READ, found[stream])
            while waiting.get_map():
                for key, _ in waiting.select(max(0.0, end - time.monotonic())):
                    piece = os.read(key.fd, 1 << 16)
                    key.data.extend(piece)
                    if not piece:
                        waiting.unregister(key.fileobj)
                    if len(key.data) > _OUTPUT_BYTES:
                        raise DeviceError(f"more than {_OUTPUT_BYTES >> 20} MB", self._trial())
                if time.monotonic() > end:
                    raise self._late()
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise self._late() from error
        out, err = (text.decode(errors="replace") for text in found.values())
        return out, err

    def _late(self) -> DeviceError:
        fix = f"raise timeout_s of [devices.{self.name}], or {self._trial()}"
        return DeviceError(f"no answer within {self.timeout_s:g} s", fix)

    def _trial(self) -> str:
        return f"try `{shlex.join(self.command('true'))}` by hand"


def plain(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _filled(
    template: Sequence[str], many: str, words: Sequence[str], texts: Mapping[str, str]
) -> list[str]:
    """The template with the word `many` replaced by `words`, and `texts` within words."""
    out: list[str] = []
    for word in template:
        if word == many:
            out += words
            continue
        for name, text in texts.items():
            word = word.replace(name, text)
        out.append(word)
    return out


def read(path: Path) -> list[Device]:
    """The devices of an inventory, in the order of the file.

    Raises:
        UsageError: it cannot be read, or a device is not described as above; names the device.
    """
    form = 'write [devices.NAME] with ssh = "HOST" or run = [...]'
    try:
        data = tomllib.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise UsageError(message("inventory", str(path), found, "a TOML file", form)) from error
    defaults, tables = data.pop("defaults", {}), data.pop("devices", {})
    if data or not tables or not isinstance(tables, dict) or not isinstance(defaults, dict):
        found = f"[{next(iter(data))}]" if data else "no devices"
        raise UsageError(message("inventory", str(path), found, "tables of devices", form))
    if len(tables) > _DEVICES:
        found, fix = f"{len(tables)} devices", "write several inventories"
        raise UsageError(message("inventory", str(path), found, f"at most {_DEVICES}", fix))
    return [_device(name, defaults, table) for name, table in tables.items()]


def _text(path: Path) -> str:
    """The inventory's text.

    Raises:
        OSError: it is no file that can be read.
        ValueError: it is no text, or too long.
    """
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        data = file.read(_FILE_BYTES + 1)
    if len(data) > _FILE_BYTES:
        raise ValueError(f"more than {_FILE_BYTES >> 20} MB")
    return data.decode()


def _device(name: str, defaults: dict[str, Any], table: object) -> Device:
    fix = "write it as `sparsegraph bench --help` says"
    shown = plain(name)[:100]
    if not isinstance(table, dict):
        raise UsageError(message("device", shown, repr(table)[:100], "a table", fix))
    if "name" in table or "name" in defaults:
        fix = f"leave it out: [devices.{shown}] is its name"
        raise UsageError(message("device", shown, "name: a key", "no such key", fix))
    try:
        return Device(**{**defaults, **table, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the table"
        found = f"{where}: {first['msg'].removeprefix('Value error, ')}"
        fix = f"correct [devices.{shown}]"
        raise UsageError(message("device", shown, found, "a device", fix)) from error
    except TypeError as error:
        raise UsageError(message("device", shown, str(error), "a device", fix)) from error
