/* A model with its weights and workspace: checks what the caller gives, remembers what failed. */
#include "driver.h"

#include <stddef.h>

enum { LINE = 64 }; /* alignment of weights */

static int32_t fail(sg_instance *instance, const char *error)
{
    instance->error = error;
    return SG_BAD_ARGUMENT;
}

int32_t sg_init(sg_instance *instance, const void *weights, int64_t weights_bytes, void *workspace,
                int64_t workspace_bytes)
{
    if (!instance)
        return SG_BAD_ARGUMENT;
    *instance = (sg_instance){NULL, NULL, 0, "ok"};
    if (sg_missing_feature()) {
        fail(instance, sg_cpu_error());
        return SG_NO_CPU;
    }
    if (sg_n_segments() != 1)
        return fail(instance, "the model has parts that ONNX Runtime runs");
    if (!weights || !workspace)
        return fail(instance, "a null pointer");
    if (weights_bytes != sg_weights_bytes())
        return fail(instance, "these are not the weights of this model: wrong size");
    if ((uintptr_t)weights % LINE)
        return fail(instance, "the weights are not aligned to 64 bytes");
    if (workspace_bytes < sg_workspace_bytes(0, 1))
        return fail(instance, "the workspace is smaller than sg_workspace_bytes(0, 1)");
    instance->weights = weights;
    instance->workspace = workspace;
    while (instance->n_threads < SG_MAX_THREADS &&
           sg_workspace_bytes(0, instance->n_threads + 1) <= workspace_bytes)
        instance->n_threads++;
    return SG_OK;
}

int32_t sg_instance_run(sg_instance *instance, const void *const *inputs, void *const *outputs,
                        sg_pool *pool)
{
    if (!instance)
        return SG_BAD_ARGUMENT;
    if (!instance->weights)
        return fail(instance, "sg_init has not succeeded");
    if (sg_pool_threads(pool) > instance->n_threads)
        return fail(instance, "the workspace is too small for the threads of the pool");
    int32_t status =
        sg_run(0, instance->weights, instance->workspace, inputs, outputs, pool);
    instance->error = sg_status_text(status);
    return status;
}

const char *sg_last_error(const sg_instance *instance)
{
    return instance && instance->error ? instance->error : "no instance";
}
