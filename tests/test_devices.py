"""Timing on devices: scripts, a fake ssh and an emulator stand for machines elsewhere."""

import json
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from sparsegraph.targets import get
from typer.testing import CliRunner

from sparsegraph import device_bench, devices, loading
from sparsegraph.cli import app
from sparsegraph.device_bench import DeviceTime
from sparsegraph.errors import UnsupportedError, UsageError
from tests.targets import cross

HERE = {"run": ("{words}",), "repeats": 3, "retries": 0, "wait_s": 0.0}


def device(name: str, **changes: object) -> devices.Device:
    return devices.Device(**{**HERE, "name": name, **changes})  # type: ignore[arg-type]


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def one(artefact: Path, name: str = "one", **changes: object) -> DeviceTime:
    (found,) = device_bench.bench(artefact, [device(name, **changes)]).times
    return found


def test_a_device_times_every_kernel(artefact: Path) -> None:
    found = one(artefact, repeats=5)
    (segment,) = loading.read_manifest(artefact)["segments"]
    assert found.error is None
    names = [", ".join(step["nodes"]) or step["kernel"] for step in segment["steps"]]
    assert [name for name, _ in found.steps] == names
    assert found.median_ms is not None
    assert found.min_ms is not None
    assert 0 < found.min_ms <= found.median_ms
    assert 0 < sum(ms for _, ms in found.steps) <= found.median_ms * 1.01
    assert found.slowest.startswith(max(found.steps, key=lambda s: s[1])[0])


def test_files_are_pushed_and_commands_quoted(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "on-device"
    folder.mkdir()
    push, run = ("cp", "{files}", "{folder}/"), ("sh", "-c", "{command}")
    assert one(artefact, push=push, run=run, folder=str(folder)).error is None
    assert sorted(p.name for p in folder.iterdir()) == ["bench", "model.so", "weights.bin"]
    spaced = device("one", run=("sh", "-c", "{command}"))
    assert spaced.execute(spaced.command("echo", "a  b", "$HOME;")) == "a  b $HOME;\n"


def test_devices_run_at_once(artefact: Path, tmp_path: Path) -> None:
    """Each waits for the other to have begun."""
    wait = 'touch {0}/{1}; while [ ! -e {0}/{2} ]; do sleep .02; done; exec "$@"'
    runs = [script(tmp_path / f"run_{a}", wait.format(tmp_path, a, b)) for a, b in ("xy", "yx")]
    both = [device(name, run=(run, "{words}"), timeout_s=20) for name, run in zip("xy", runs)]
    found = device_bench.bench(artefact, both)
    assert [t.device for t in found.times] == ["x", "y"]
    assert found.errors == []


def test_a_failure_is_tried_again(artefact: Path, tmp_path: Path) -> None:
    text = f'[ -e {tmp_path}/tried ] || {{ touch {tmp_path}/tried; exit 9; }}\nexec "$@"'
    run = (script(tmp_path / "run", text), "{words}")
    found = one(artefact, run=run, retries=1)
    assert (found.attempts, found.error) == (2, None)
    (tmp_path / "tried").unlink()
    assert one(artefact, run=run).attempts == 1


def test_a_silent_device_is_left_and_stopped(artefact: Path, tmp_path: Path) -> None:
    late = tmp_path / "late"
    run = ("sh", "-c", f"(sleep 1; touch {late}) & wait # {{command}}")
    start = time.monotonic()
    found = one(artefact, "kitchen", run=run, timeout_s=0.2)
    assert time.monotonic() - start < 10
    assert found.median_ms is None
    assert "device 'kitchen': found no answer within 0.2 s" in str(found.error)
    assert "timeout_s of [devices.kitchen]" in str(found.error)
    time.sleep(1.2)
    assert not late.exists()


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (("sh", "-c", "echo broken >&2; exit 7; {command}"), "exit code 7: broken"),
        (("sh", "-c", "echo hello; # {command}"), "no timing but 'hello'"),
        (("no-such-command", "{words}"), "no-such-command: No such file"),
        (("qemu-none", "{words}"), "in [devices.porch]"),
        (("sh", "-c", "{command} more"), "usage: bench"),
    ],
)
def test_errors_name_the_device(artefact: Path, run: tuple[str, ...], expected: str) -> None:
    found = one(artefact, "porch", run=run)
    assert "device 'porch'" in str(found.error)
    assert expected in str(found.error)
    assert "Fix: " in str(found.error)


def test_a_device_that_the_bundle_is_not_for(artefact: Path) -> None:
    found = one(artefact, "pi", target="raspberry-pi-5")
    assert found.attempts == 0
    assert "device 'pi': found raspberry-pi-5" in str(found.error)
    assert "--target raspberry-pi-5" in str(found.error)
    with pytest.raises(UnsupportedError, match="lacks dotprod, fullfp16"):
        device_bench._check(device("pi", target="cortex-a53"), get("raspberry-pi-5"))
    device_bench._check(device("pi", target="raspberry-pi-5"), get("cortex-a53"))


def test_ssh_quotes_for_the_shell_there(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssh HOST TEXT` hands TEXT to a shell; `scp FILES HOST:FOLDER/` copies."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    tools.mkdir()
    home.mkdir()
    log = tmp_path / "log"
    head = f'cd {home}\necho "$0 $@" >> {log}\nfor last; do :; done\n'
    script(tools / "ssh", head + 'exec sh -c "$last"')
    script(tools / "scp", head + 'shift 5\ncp "$1" "$2" "$3" "${last#*:}"')
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    found = one(artefact, run=(), ssh="me@kitchen", folder="a/b")
    assert found.error is None
    assert (home / "a/b/weights.bin").is_file()
    lines = log.read_text().splitlines()
    assert [Path(line.split()[0]).name for line in lines] == ["ssh", "scp", "ssh"]
    assert all("BatchMode=yes" in line and "me@kitchen" in line for line in lines)
    assert lines[2].endswith("timeout 120 a/b/bench a/b/weights.bin 1 3")


INVENTORY = """
[defaults]
repeats = 7
timeout_s = 5

[devices.near]
run = ["sh", "-c", "{command}"]
timeout_s = 9

[devices.far]
ssh = "pi@far"
target = "raspberry-pi-5"
"""


def test_inventory(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text(INVENTORY)
    near, far = devices.read(file)
    assert (near.name, near.repeats, near.timeout_s) == ("near", 7, 9)
    assert (far.name, far.repeats, far.timeout_s) == ("far", 7, 5)
    assert near.is_here
    assert not far.is_here


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no devices"),
        ("[device.a]\nssh = 'b'", "[device]"),
        ("[devices.a", "inventory"),
        ("devices = 3", "no devices"),
        ("[devices]\na = 3", "device 'a'"),
        ("[devices.a]", "device 'a': found the table: need either ssh or run"),
        ("[devices.a]\nssh = 'b'\nrun = ['{words}']", "need either ssh or run"),
        ("[devices.a]\nssh = 'b'\npush = ['cp', '{files}']", "brings its own push"),
        ("[devices.a]\nssh = '-oProxyCommand=x'", "ssh"),
        ("[devices.a]\nssh = 'b'\nfolder = 'a b'", "folder"),
        ("[devices.a]\nrun = ['sh']", "no word {words} or {command}"),
        ("[devices.a]\nrun = ['{words}']\npush = ['cp']", "no word {files}"),
        ("[devices.a]\nssh = 'b'\nthreads = 0", "threads"),
        ("[devices.a]\nssh = 'b'\nhost = 'c'", "host"),
        ("[devices.a]\nssh = 'b'\n[devices.a]\nssh = 'c'", "Cannot declare"),
        ("[devices.a]\nssh = 'b'\nssh = 'c'", "Cannot overwrite"),
        ("[devices.a]\nssh = 'b'\nname = 'c'", "name: a key"),
        ("defaults = 3\n[devices.a]\nssh = 'b'", "tables of devices"),
        ("[devices.'']\nssh = 'b'", "name"),
        ('[devices."a\\u001b[2J"]\nssh = "b"', "device 'a?[2J': found name"),
        ("[devices.a]\nssh = 5", "ssh"),
        ("[devices.a]\nssh = 'b; rm -r x'", "ssh"),
        ("[devices.a]\nssh = '$(x)'", "ssh"),
        ('[devices.a]\nssh = "b\\n-oProxyCommand=x"', "ssh"),
        ("[devices.a]\nssh = 'b'\nfolder = '-rf'", "folder"),
        ("[devices.a]\nssh = 'b'\nfolder = '$HOME'", "folder"),
        ("[devices.a]\nrun = 'sh {command}'", "run"),
        ("[devices.a]\nrun = [1, '{words}']", "run"),
        ("[devices.a]\nrun = ['', '{words}']", "run: an empty command"),
        ('[devices.a]\nrun = ["{words}", "\\u0000"]', "a zero byte"),
        ("[devices.a]\nssh = 'b'\ntimeout_s = 0", "timeout_s"),
        ("[devices.a]\nssh = 'b'\ntimeout_s = -1", "timeout_s"),
        ("[devices.a]\nssh = 'b'\ntimeout_s = 1e300", "timeout_s"),
        ("[devices.a]\nssh = 'b'\ntimeout_s = inf", "timeout_s"),
        ("[devices.a]\nssh = 'b'\ntimeout_s = nan", "timeout_s"),
        ("[devices.a]\nssh = 'b'\ntimeout_s = '5'", "timeout_s"),
        ("[devices.a]\nssh = 'b'\nwait_s = inf", "wait_s"),
        ("[devices.a]\nssh = 'b'\nretries = 1000000", "retries"),
        ("[devices.a]\nssh = 'b'\nrepeats = true", "repeats"),
        ("[devices.a]\nssh = 'b'\nthreads = 99999999999", "threads"),
        ("a = " + 9999 * "[", "inventory"),
        ("#" * ((1 << 20) + 1), "more than 1 MB"),
        ("".join(f"[devices.a{i}]\nssh = 'b'\n" for i in range(257)), "257 devices"),
    ],
    ids=lambda text: text[:40],
)
def test_inventories_that_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        devices.read(file)
    assert expected in str(caught.value)


def test_no_inventory() -> None:
    with pytest.raises(UsageError, match="No such file"):
        devices.read(Path("no.toml"))


def test_an_inventory_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(UsageError, match="no regular file"):
            devices.read(path)
    (tmp_path / "devices.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="inventory"):
        devices.read(tmp_path / "devices.toml")


TIMES = '"median_ms": 2, "min_ms": 1'


@pytest.mark.parametrize(
    "answer",
    [
        "\x1b[2J\xff",
        "[" * 100_000,
        "[1, 2]",
        "null",
        '{"steps": 3, TIMES}',
        '{"steps": [], TIMES}',
        '{"steps": [STEP, STEP], TIMES}',
        '{"steps": [STEP], "median_ms": NaN, "min_ms": 1}',
        '{"steps": [STEP], "median_ms": 1e999, "min_ms": 1}',
        '{"steps": [STEP], "median_ms": 1, "min_ms": -1}',
        '{"steps": [STEP], "median_ms": 1, "min_ms": 2}',
        '{"steps": [{"nodes": "a", "ms": -Infinity}], TIMES}',
        '{"steps": [{"nodes": "a", "ms": 1' + "0" * 400 + "}], TIMES}",
        '{"steps": [{"nodes": "a"}], TIMES}',
        '{"steps": ["a"], TIMES}',
    ],
    ids=lambda text: text[:40],
)
def test_answers_that_are_no_timing(answer: str, tmp_path: Path) -> None:
    text = answer.replace("STEP", '{"nodes": "a", "ms": 1}').replace("TIMES", TIMES)
    (tmp_path / "answer").write_text(text)
    odd = device("porch", run=("sh", "-c", f"cat {tmp_path}/answer # {{command}}"))
    files = [tmp_path / name for name in ("bench", "model.so", "weights.bin")]
    with pytest.raises(devices.DeviceError, match="no timing but") as caught:
        device_bench._result(odd, files, 1)
    assert caught.value.found.isprintable()


def test_a_timing_of_this_bundle_is_taken() -> None:
    text = '{"steps": [{"nodes": "a\\u001b", "ms": 0}], ' + TIMES + "}"
    found = device_bench._timing(text, 1)
    assert found == {"median_ms": 2.0, "min_ms": 1.0, "steps": (("a?", 0.0),)}


def test_a_device_that_never_stops_talking(artefact: Path) -> None:
    for stream in ("", ">&2"):
        found = one(artefact, run=("sh", "-c", f"yes {stream} # {{command}}"), timeout_s=60)
        assert "found more than 8 MB" in str(found.error)


def test_a_process_that_outlives_its_device_is_not_waited_for(artefact: Path) -> None:
    start = time.monotonic()
    run = ("sh", "-c", "setsid sleep 20 & sleep 20 # {command}")
    assert "no answer" in str(one(artefact, run=run, timeout_s=0.3).error)
    assert time.monotonic() - start < 10


def test_links_in_the_work_folder_are_not_written_through(tmp_path: Path) -> None:
    """The folder may be a link; a link in the place of a file goes, what it names stays."""
    precious, folder = tmp_path / "precious", tmp_path / "elsewhere"
    precious.write_text("mine")
    folder.mkdir()
    (folder / "bench").symlink_to(precious)
    (tmp_path / "work").symlink_to(folder)
    kitchen = device("kitchen", run=(), ssh="kitchen", folder=str(tmp_path / "work"))
    room = kitchen.copying([Path("bench"), Path("a b; x")])[0][-1]
    subprocess.run(["sh", "-c", room], check=True)
    assert precious.read_text() == "mine"
    assert (tmp_path / "work").is_symlink()
    assert list(folder.iterdir()) == []


def test_command_line(artefact: Path, tmp_path: Path) -> None:
    file, to = tmp_path / "devices.toml", tmp_path / "out.json"
    good = "[defaults]\nretries = 0\nrepeats = 2\n[devices.good]\nrun = ['{words}']\n"
    file.write_text(good)
    words = ["bench", str(artefact), "--devices", str(file), "--json", str(to)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "good" in done.stdout
    file.write_text(good + "[devices.bad]\nrun = ['false', '{words}']")
    assert CliRunner().invoke(app, words).exit_code == 3
    first, second = json.loads(to.read_text())["times"]
    assert first["median_ms"] > 0
    assert "device 'bad'" in second["error"]


def test_bundles_without_a_library_are_refused(artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, tmp_path / "m.sg")
    (tmp_path / "m.sg" / "model.so").unlink()
    with pytest.raises(UsageError, match="whose library runs the whole model"):
        device_bench.bench(tmp_path / "m.sg", [device("one")])


def test_an_emulated_device(tmp_path: Path) -> None:
    target = get("aarch64")
    cross.require(*target.linker, *target.emulator[:1])
    compiled = cross.Case("digits_cnn", 0.1).compile(target, tmp_path / "m.sg")
    run = (*target.emulator, "{words}")
    found = one(compiled.path, run=run, target="raspberry-pi-5", repeats=2)
    assert found.error is None
    assert found.median_ms is not None
    assert found.median_ms > 0
