"""Devices behind OpenSSH: a real server on this machine's loopback, with keys of its own."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sparsegraph.targets import native
from typer.testing import CliRunner

from sparsegraph import device_bench, devices
from sparsegraph.cli import app
from sparsegraph.device_bench import DeviceTime
from tests.conftest import BATCH
from tests.targets import cross

SYSTEM_PATH = "/usr/sbin:/sbin"  # where servers lie; not in everyone's PATH
SERVER = """ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
PidFile {folder}/pid
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp {sftp}
ForceCommand {folder}/gate
"""
CLIENT = """Host stranger
  UserKnownHostsFile /dev/null
Host shelf shelf-too stranger
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""
GATE = """#!/bin/sh
cd {folder}/home
case "$SSH_ORIGINAL_COMMAND" in
  */weights.bin*) ;;
  *) exec sh -c "$SSH_ORIGINAL_COMMAND" ;;
esac
if [ -e {folder}/hold ]; then
  rm {folder}/hold
  held="./sparsegraph-bench/bench sparsegraph-bench/weights.bin 1 10000"
  timeout 20 sh -c "while $held; do :; done" >/dev/null &
  echo $! >{folder}/held
  wait
fi
mkdir {folder}/busy || touch {folder}/overlap
sleep .2
sh -c "$SSH_ORIGINAL_COMMAND"
status=$?
rmdir {folder}/busy
exit $status
"""


class Server:
    """An ssh server for one user with one key; commands run in `home`."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder, self.program = folder, program
        self.home = folder / "home"
        self.home.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        host = (folder / "host.pub").read_text()
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {host}")
        self._write("server", SERVER)
        self._write("client", CLIENT)
        self._write("gate", GATE).chmod(0o755)
        for name in ("ssh", "scp"):
            script = f'#!/bin/sh\nexec {shutil.which(name)} -F {folder}/client "$@"\n'
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None

    def _write(self, name: str, text: str) -> Path:
        sftp = "/usr/lib/openssh/sftp-server"
        words = {"port": self.port, "folder": self.folder, "user": getpass.getuser(), "sftp": sftp}
        path = self.folder / name
        path.write_text(text.format(**words))
        return path

    def start(self) -> None:
        """Until it answers."""
        with (self.folder / "log").open("ab") as log:
            command = [self.program, "-D", "-e", "-f", str(self.folder / "server")]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(100):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the ssh server does not answer")

    def stop(self) -> None:
        """The server and all its connections, at once."""
        if self.process is None:
            return
        found = subprocess.run(
            ["ps", "-e", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in found.stdout.splitlines()]
        ended = {self.process.pid}
        while (
            more := {int(p) for p, up, name in rows if int(up) in ended and "sshd" in name} - ended
        ):
            ended |= more
        for pid in ended:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cross.require("ssh", "scp", "ssh-keygen")
    program = shutil.which("sshd", path=os.environ["PATH"] + ":" + SYSTEM_PATH)
    if program is None:
        pytest.skip("needs sshd (Debian: openssh-server)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where the server confines itself
    server = Server(tmp_path_factory.mktemp("shelf"), program)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(shelf: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Running, and `ssh` and `scp` know it."""
    monkeypatch.setenv("PATH", f"{shelf.folder}/bin:{os.environ['PATH']}")
    (shelf.folder / "overlap").unlink(missing_ok=True)
    if shelf.process is None:
        shelf.start()
    yield shelf
    held = shelf.folder / "held"
    if held.exists():
        subprocess.run(["kill", held.read_text().strip()], stderr=subprocess.DEVNULL, check=False)
        held.unlink()


def device(name: str = "one", **changes: object) -> devices.Device:
    words = {"name": name, "ssh": "shelf", "repeats": 3, "retries": 0, "wait_s": 0.1}
    return devices.Device(**{**words, "timeout_s": 30, **changes})  # type: ignore[arg-type]


def one(artefact: Path, **changes: object) -> DeviceTime:
    (found,) = device_bench.bench(artefact, [device(**changes)]).times
    return found


def once_held(server: Server, act: Callable[[], None]) -> threading.Thread:
    """Do `act` as soon as the device runs the program that is held."""

    def wait() -> None:
        for _ in range(600):
            if (server.folder / "held").exists():
                return act()
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_bench_over_ssh(artefact: Path, server: Server, tmp_path: Path) -> None:
    file, to = tmp_path / "devices.toml", tmp_path / "out.json"
    file.write_text(
        "[defaults]\nrepeats = 3\nretries = 0\n"
        '[devices.one]\nssh = "shelf"\n[devices.two]\nssh = "shelf-too"\nfolder = "two/deep"\n'
    )
    words = ["bench", str(artefact), "--devices", str(file), "--json", str(to)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for row in json.loads(to.read_text())["times"]:
        assert 0 < row["min_ms"] <= row["median_ms"]
    names = ["bench", "model.so", "weights.bin"]
    for folder in ("sparsegraph-bench", "two/deep"):
        assert sorted(p.name for p in (server.home / folder).iterdir()) == names


def test_tuning_over_ssh(model_file: Path, server: Server, tmp_path: Path) -> None:
    inventory, file = tmp_path / "devices.toml", tmp_path / "tuning.json"
    inventory.write_text(f'[devices.one]\ntarget = "{native()}"\nssh = "shelf"\nrepeats = 2\n')
    words = ["compile", str(model_file), "--tune", "--tuning", str(file), "--devices"]
    words += [str(inventory), "--dim", f"batch={BATCH}", "-o", str(tmp_path / "m.sg")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "2 products measured" in done.stdout
    assert json.loads(file.read_text())["cpu"] == "device one"


def test_one_machine_under_two_names_takes_turns(artefact: Path, server: Server) -> None:
    found = device_bench.bench(artefact, [device(name) for name in ("one", "two", "three")])
    assert found.errors == []
    assert not (server.folder / "overlap").exists()


def test_a_connection_that_breaks_is_tried_again(artefact: Path, server: Server) -> None:
    """The program of the first attempt still runs on the device during the second."""
    (server.folder / "hold").touch()

    def again() -> None:
        server.stop()
        server.start()

    thread = once_held(server, again)
    found = one(artefact, retries=2)
    thread.join()
    assert (server.folder / "held").exists()
    assert (found.attempts, found.error) == (2, None)


def test_a_server_that_is_gone(artefact: Path, server: Server) -> None:
    (server.folder / "hold").touch()
    thread = once_held(server, server.stop)
    found = one(artefact, retries=1)
    thread.join()
    assert found.attempts == 2
    assert found.median_ms is None
    assert "Connection refused (2 attempts)" in str(found.error)


def test_a_device_that_hangs(artefact: Path, server: Server) -> None:
    (server.folder / "hold").touch()
    start = time.monotonic()
    found = one(artefact, timeout_s=2, retries=1)
    assert time.monotonic() - start < 20
    assert (found.attempts, found.error) == (2, None)


def test_refusals_of_ssh_are_told(artefact: Path, server: Server) -> None:
    stranger = one(artefact, ssh="stranger")
    assert "Host key verification failed" in str(stranger.error)
    assert "by hand" in str(stranger.error)
    key = server.folder / "user.pub"
    kept = key.read_text()
    key.write_text("")
    try:
        refused = one(artefact)
    finally:
        key.write_text(kept)
    assert "Permission denied (publickey)" in str(refused.error)
