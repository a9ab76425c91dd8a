/* node count_module.mjs BUNDLE MODULE: instructions that one run of a counting module executes. */
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, counting] = process.argv.slice(2);
const { Model } = await import(pathToFileURL(`${folder}/model.mjs`));
const model = await Model.load(readFileSync(counting), readFileSync(`${folder}/weights.bin`));
const arrays = {
    float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array,
};
const feeds = Object.fromEntries(
    model.inputs.map((input) => [input.name, new arrays[input.dtype](input.size)]));
model.run(feeds);
const before = model.code.executed.value;
model.run(feeds);
console.log(`executed ${model.code.executed.value - before}`);
