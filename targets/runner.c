/* Runs a compiled model on raw files: the C interface in use, and the test of cross targets.
 *
 *     ./example weights.bin THREADS input_0.bin ... output_0.bin ...
 *
 * For models that are one segment. Files hold contiguous little-endian values. CMakeLists.txt
 * beside this file builds it; without CMake, for a shared library:
 *
 *     cc -std=c11 main.c -I. -L. -l:model.so -Wl,-rpath,'$ORIGIN' -o example
 */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>

static void stop(const char *what, const char *name)
{
    fprintf(stderr, "%s '%s'\n", what, name);
    exit(1);
}

/* 64-byte aligned memory that holds `n_bytes` of the file, or nothing yet. */
static void *memory(const char *path, int64_t n_bytes)
{
    void *data = aligned_alloc(64, ((size_t)n_bytes + 64) / 64 * 64);
    if (!data)
        stop("out of memory for", path ? path : "workspace");
    if (path) {
        FILE *file = fopen(path, "rb");
        if (!file)
            stop("cannot read", path);
        if (fread(data, 1, (size_t)n_bytes, file) != (size_t)n_bytes || fgetc(file) != EOF)
            stop("wrong size of", path);
        fclose(file);
    }
    return data;
}

static void save(const char *path, const void *data, int64_t n_bytes)
{
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, (size_t)n_bytes, file) != (size_t)n_bytes || fclose(file))
        stop("cannot write", path);
}

int main(int argc, char **argv)
{
    const int32_t n_inputs = sg_n_inputs(0), n_outputs = sg_n_outputs(0);
    if (sg_abi() != SG_ABI || sg_n_segments() != 1)
        stop("not one segment of this ABI:", "model");
    if (argc != 3 + n_inputs + n_outputs)
        stop("usage: WEIGHTS THREADS INPUTS... OUTPUTS...", argv[0]);
    char **input_paths = argv + 3, **output_paths = argv + 3 + n_inputs;
    const void **inputs = calloc((size_t)n_inputs + 1, sizeof *inputs);
    void **outputs = calloc((size_t)n_outputs + 1, sizeof *outputs);
    if (!inputs || !outputs)
        stop("out of memory for", "pointers");
    for (int32_t i = 0; i < n_inputs; i++)
        inputs[i] = memory(input_paths[i], sg_input(0, i)->n_bytes);
    for (int32_t i = 0; i < n_outputs; i++)
        outputs[i] = memory(NULL, sg_output(0, i)->n_bytes);

    sg_pool *pool = NULL;
    int32_t n_threads = atoi(argv[2]);
    int32_t status = sg_pool_create(n_threads, &pool);
    if (status != SG_OK)
        stop("cannot run:", sg_status_text(status));
    int64_t n_weights = sg_weights_bytes(), n_workspace = sg_workspace_bytes(0, n_threads);
    void *weights = memory(argv[1], n_weights), *workspace = memory(NULL, n_workspace);
    sg_instance model;
    status = sg_init(&model, weights, n_weights, workspace, n_workspace);
    if (status == SG_OK)
        status = sg_instance_run(&model, inputs, outputs, pool);
    if (status != SG_OK)
        stop("cannot run:", sg_last_error(&model));
    sg_pool_destroy(pool);
    free(weights);
    free(workspace);
    for (int32_t i = 0; i < n_outputs; i++)
        save(output_paths[i], outputs[i], sg_output(0, i)->n_bytes);
    for (int32_t i = 0; i < n_inputs; i++)
        free((void *)inputs[i]);
    for (int32_t i = 0; i < n_outputs; i++)
        free(outputs[i]);
    free(inputs);
    free(outputs);
    return 0;
}
