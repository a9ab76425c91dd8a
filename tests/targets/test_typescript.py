"""The types of the WebAssembly loader, as TypeScript's strict mode reads them."""

import shutil
import subprocess
from pathlib import Path

import pytest
import sparsegraph.targets

GOOD = """
import { Model, type Tensor, type TensorData } from "./model.mjs";

export async function run(bytes: Uint8Array<ArrayBuffer>): Promise<number> {
    const model: Model = await Model.load(bytes, bytes);
    const feeds: Record<string, TensorData> = {};
    for (const input of model.inputs)
        feeds[input.name] = new Float32Array(input.size);
    const outputs = model.run(feeds);
    const first: Tensor | undefined = model.outputs[0];
    const rank: number = first?.shape.length ?? 0;
    const values = outputs[first?.name ?? ""];
    return rank + Number(values instanceof BigInt64Array ? values[0] : values?.[0]);
}

export const compiled = async (module: WebAssembly.Module) => Model.load(module, new Uint8Array());
"""
WRONG = {  # statement: the compiler's code for what is wrong with it
    "model.run(3);": "TS2345",
    "model.run({ x: [1, 2] });": "TS2322",
    "model.inputs[0]!.size = 1;": "TS2540",
    "model.inputs.pop();": "TS2339",
    "await Model.load(new Uint8Array(), 'weights.bin');": "TS2345",
    "new Model();": "TS2673",
    "const y: Float32Array = model.run({})['y']!;": "TS2322",
}
OPTIONS = (
    "--strict", "--noEmit", "--noUncheckedIndexedAccess", "--module", "nodenext",
    "--target", "es2022", "--lib", "es2022,dom",
)  # fmt: skip


def check(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What `tsc` says of a program that uses the loader; library types are checked too."""
    compiler = shutil.which("tsc")
    if compiler is None:
        pytest.skip("needs tsc (npm: typescript)")
    sources = Path(sparsegraph.targets.__file__).parent
    for name in ("model.mjs", "model.d.mts"):
        shutil.copyfile(sources / name, folder / name)
    (folder / "use.mts").write_text(text)
    command = [compiler, *OPTIONS, "use.mts"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_strict_program_uses_the_loader(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD)
    assert done.returncode == 0, done.stdout


def test_wrong_uses_are_type_errors(tmp_path: Path) -> None:
    head = 'import { Model } from "./model.mjs";\ndeclare const model: Model;\n'
    done = check(tmp_path, head + "\n".join(WRONG) + "\n")
    assert done.returncode != 0
    errors = {line for line in done.stdout.splitlines() if line.startswith("use.mts")}
    for i, (statement, code) in enumerate(WRONG.items()):
        own = [e for e in errors if e.startswith(f"use.mts({i + 3},")]
        assert any(code in e for e in own), (statement, done.stdout)
