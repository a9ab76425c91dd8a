/* C interface of a compiled model (`model.so` of an artefact).
 *
 * A model has one or more segments; a model without parts that ONNX Runtime runs has exactly one.
 * Tensors are contiguous and row-major; their sizes are fixed when the model is compiled.
 *
 *     void *weights = <weights.bin, mapped or read, 64-byte aligned>;
 *     void *workspace = malloc(sg_workspace_bytes(0, 1));
 *     int32_t status = sg_run(0, weights, workspace, inputs, outputs, NULL);
 *     if (status != SG_OK) puts(sg_status_text(status));
 *
 * A library may hold code for several kinds of CPU. When it is loaded it picks the best that this CPU
 * runs; if there is none, `sg_missing_feature` names what the CPU lacks, and no call runs the model.
 *
 * The library has no mutable state. Any number of threads may call `sg_run` at the same time, each
 * with its own workspace and outputs. Calls that share a pool run one after the other. Results are
 * the same bits for any number of threads.
 */
#ifndef SG_RUNTIME_H
#define SG_RUNTIME_H

#include <stdint.h>

#define SG_ABI 1
#if defined(__GNUC__)
#define SG_API __attribute__((visibility("default")))
#else
#define SG_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SG_OK = 0, SG_BAD_ARGUMENT = 1, SG_NO_MEMORY = 2, SG_NO_THREAD = 3, SG_NO_CPU = 4 };

typedef struct {
    const char *name;     /* UTF-8, as in the ONNX model */
    int32_t dtype;        /* number of the type in ONNX's TensorProto.DataType */
    int32_t rank;
    const int64_t *shape; /* `rank` extents */
    int64_t n_bytes;
} sg_tensor;

typedef struct sg_pool sg_pool; /* threads that wait for work */

SG_API int32_t sg_abi(void); /* SG_ABI of the library; compare before any other call */
SG_API const char *sg_status_text(int32_t status);

SG_API const char *sg_missing_feature(void); /* in LLVM's words; NULL if this CPU can run the model */
SG_API int32_t sg_code_index(void); /* of the code in use, 0 the best; -1 for none */

SG_API int32_t sg_n_segments(void);
SG_API int32_t sg_n_inputs(int32_t segment); /* 0 where there is no such segment */
SG_API int32_t sg_n_outputs(int32_t segment);
SG_API int32_t sg_n_steps(int32_t segment);
SG_API const sg_tensor *sg_input(int32_t segment, int32_t i); /* NULL where there is none */
SG_API const sg_tensor *sg_output(int32_t segment, int32_t i);
SG_API const char *sg_step_name(int32_t segment, int32_t i);
SG_API int64_t sg_weights_bytes(void); /* size of weights.bin */
/* Memory that one call needs, any alignment; -1 for a bad argument. */
SG_API int64_t sg_workspace_bytes(int32_t segment, int32_t n_threads);

/* `n_threads` counts the caller. One thread needs no pool: `*pool` becomes NULL. */
SG_API int32_t sg_pool_create(int32_t n_threads, sg_pool **pool);
SG_API void sg_pool_destroy(sg_pool *pool); /* NULL is allowed; no call may use the pool */

/* Inputs and outputs in the order of `sg_input` and `sg_output`; `pool` NULL: this thread only. */
SG_API int32_t sg_run(int32_t segment, const void *weights, void *workspace,
                      const void *const *inputs, void *const *outputs, sg_pool *pool);
/* The same, and the seconds that each of the `sg_n_steps` steps took. */
SG_API int32_t sg_profile(int32_t segment, const void *weights, void *workspace,
                          const void *const *inputs, void *const *outputs, sg_pool *pool,
                          double *seconds);

/* A model of one segment with its weights and workspace; all memory is the caller's. Every instance
 * has a workspace of its own; instances may share weights, and run at the same time.
 *
 *     sg_instance model;
 *     if (sg_init(&model, weights, n_weights, workspace, n_workspace) ||
 *         sg_instance_run(&model, inputs, outputs, NULL))
 *         puts(sg_last_error(&model));
 */
typedef struct {
    const void *weights; /* NULL until sg_init succeeded */
    void *workspace;
    int32_t n_threads; /* most threads that the workspace has room for */
    const char *error;
} sg_instance;

/* SG_NO_CPU if the CPU lacks a feature; SG_BAD_ARGUMENT if a pointer is NULL, the weights are not this model's size or not aligned to 64
 * bytes, or the workspace is smaller than sg_workspace_bytes(0, 1). */
SG_API int32_t sg_init(sg_instance *instance, const void *weights, int64_t weights_bytes,
                       void *workspace, int64_t workspace_bytes);
/* As sg_run; `pool` NULL or of at most as many threads as the workspace has room for. */
SG_API int32_t sg_instance_run(sg_instance *instance, const void *const *inputs,
                               void *const *outputs, sg_pool *pool);
/* Why the last call with this instance failed; "ok" if it did not. */
SG_API const char *sg_last_error(const sg_instance *instance);

#ifdef __cplusplus
}
#endif
#endif
