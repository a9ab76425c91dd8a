/* Loads a compiled model (`model.wasm`) and runs it: see model.d.mts. */

const ABI = 1;
const PAGE = 65536;
const LINE = 64;
const TYPES = {
    1: ["float32", Float32Array], 2: ["uint8", Uint8Array], 3: ["int8", Int8Array],
    4: ["uint16", Uint16Array], 5: ["int16", Int16Array], 6: ["int32", Int32Array],
    7: ["int64", BigInt64Array], 9: ["bool", Uint8Array], 10: ["float16", Uint16Array],
    11: ["float64", Float64Array],
};
export const ARRAYS = Object.fromEntries(Object.values(TYPES));

export class Model {
    static async load(module, weights) {
        const compiled =
            module instanceof WebAssembly.Module ? module : await WebAssembly.compile(module);
        const { exports } = await WebAssembly.instantiate(compiled, {});
        return new Model(exports, weights);
    }

    constructor(code, weights) {
        this.code = code;
        if (code.sg_abi() !== ABI || code.sg_n_segments() !== 1)
            throw new Error(`model.wasm: found ABI ${code.sg_abi()}, need ABI ${ABI}`);
        const need = Number(code.sg_weights_bytes());
        if (weights.byteLength !== need)
            throw new Error(`weights: found ${weights.byteLength} bytes, need ${need}`);
        this.inputs = this.#borders(code.sg_n_inputs(0), code.sg_input);
        this.outputs = this.#borders(code.sg_n_outputs(0), code.sg_output);
        this.#place(weights);
    }

    run(feeds) {
        for (const name of Object.keys(feeds))
            if (!this.inputs.some((t) => t.name === name))
                throw new Error(`input '${name}': no such input`);
        for (const t of this.inputs) this.#view(t).set(this.#checked(t, feeds[t.name]));
        const status = this.code.sg_run(0, this.weights, this.workspace, this.from, this.to, 0);
        if (status !== 0) throw new Error(this.#text(this.code.sg_status_text(status)));
        return Object.fromEntries(this.outputs.map((t) => [t.name, this.#view(t).slice()]));
    }

    #checked(tensor, data) {
        const type = TYPES[tensor.type][1];
        if (!(data instanceof type) || data.length !== tensor.size) {
            const found = data ? `${data.constructor.name} of ${data.length}` : "nothing";
            throw new Error(
                `input '${tensor.name}': found ${found}, need ${type.name} of ${tensor.size}`,
            );
        }
        return data;
    }

    /* Weights, workspace, tensors and tables of pointers, one after the other above the stack. */
    #place(weights) {
        const { code } = this;
        let top = code.__heap_base.value;
        const take = (bytes) => {
            const at = Math.ceil(top / LINE) * LINE;
            top = at + bytes;
            return at;
        };
        this.weights = take(weights.byteLength);
        this.workspace = take(Number(code.sg_workspace_bytes(0, 1)));
        for (const t of [...this.inputs, ...this.outputs]) t.address = take(t.bytes);
        this.from = take(4 * this.inputs.length + 4);
        this.to = take(4 * this.outputs.length + 4);
        const missing = top - code.memory.buffer.byteLength;
        if (missing > 0) code.memory.grow(Math.ceil(missing / PAGE));
        new Uint8Array(code.memory.buffer).set(weights, this.weights);
        const pointers = new DataView(code.memory.buffer);
        this.inputs.forEach((t, i) => pointers.setUint32(this.from + 4 * i, t.address, true));
        this.outputs.forEach((t, i) => pointers.setUint32(this.to + 4 * i, t.address, true));
    }

    /* sg_tensor: name, dtype, rank, shape (4 bytes each), n_bytes (8 bytes) */
    #borders(n, get) {
        const data = new DataView(this.code.memory.buffer);
        return Array.from({ length: n }, (_, i) => {
            const at = get(0, i);
            const [name, type, rank, extents] = [0, 4, 8, 12].map((o) => data.getInt32(at + o, true));
            const shape = Array.from({ length: rank }, (_, k) =>
                Number(data.getBigInt64(extents + 8 * k, true)));
            return {
                name: this.#text(name), type, dtype: TYPES[type][0], shape,
                size: shape.reduce((a, b) => a * b, 1), bytes: Number(data.getBigInt64(at + 16, true)),
            };
        });
    }

    #view(tensor) {
        return new TYPES[tensor.type][1](this.code.memory.buffer, tensor.address, tensor.size);
    }

    #text(address) {
        const bytes = new Uint8Array(this.code.memory.buffer, address);
        return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
    }
}
