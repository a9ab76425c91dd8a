/** Loader of a compiled model (`model.wasm`). */

export type TensorData =
    | Float32Array | Float64Array | Uint8Array | Int8Array | Uint16Array | Int16Array
    | Int32Array | BigInt64Array;

/** By NumPy's name of a type, what holds its numbers; of `float16`, which has no array, the bits. */
export const ARRAYS: Readonly<Record<string, new (size: number) => TensorData>>;

export interface Tensor {
    /** As in the ONNX model. */
    readonly name: string;
    /** NumPy's name: `float32`, `int64`, `bool` ... */
    readonly dtype: string;
    readonly shape: readonly number[];
    /** Number of elements. */
    readonly size: number;
}

/** One instance: its own memory, one run at a time. Load several for several workers. */
export class Model {
    private constructor();

    /**
     * @param module bytes or compiled module of `model.wasm`
     * @param weights bytes of `weights.bin`
     * @throws Error if the weights are not those of the model
     */
    static load(module: BufferSource | WebAssembly.Module, weights: Uint8Array): Promise<Model>;

    readonly inputs: readonly Tensor[];
    readonly outputs: readonly Tensor[];

    /**
     * Outputs by name, as copies.
     * @throws Error for a missing, unknown or wrong input
     */
    run(feeds: Readonly<Record<string, TensorData>>): Record<string, TensorData>;
}
