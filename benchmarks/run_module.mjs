/* node run_module.mjs MODEL.sg INPUTS... OUTPUTS...: as runner.c, for WebAssembly. */
import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, ...paths] = process.argv.slice(2);
const { ARRAYS, Model } = await import(pathToFileURL(`${folder}/model.mjs`));
const model = await Model.load(
    readFileSync(`${folder}/model.wasm`), readFileSync(`${folder}/weights.bin`));
const feeds = {};
for (const input of model.inputs) {
    const bytes = new Uint8Array(readFileSync(paths.shift()));
    feeds[input.name] = new ARRAYS[input.dtype](bytes.buffer);
}
model.run(feeds);
const results = model.run(feeds); // the second run sees what the first left in memory
for (const output of model.outputs) {
    const data = results[output.name];
    writeFileSync(paths.shift(), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
}
for (const wrong of [{ ...feeds, other: new Float32Array(1) }, ...(model.inputs.length ? [{}] : [])]) {
    let refused = false;
    try {
        model.run(wrong);
    } catch (error) {
        refused = /^input '/.test(error.message);
    }
    if (!refused) throw new Error("a wrong feed was taken");
}
