/* Times a compiled model on the machine that it is for, and prints JSON.
 *
 *     ./bench weights.bin THREADS REPEATS
 *
 * Inputs are filled with small numbers: times do not depend on values. One run before the measured
 * ones fills the caches. Each step's time is that of the run with the median.
 */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    double total;
    double *steps;
} sg_sample;

static void stop(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void *memory(int64_t n_bytes)
{
    void *data = aligned_alloc(64, ((size_t)n_bytes + 127) / 64 * 64);
    if (!data)
        stop("memory", "none left");
    memset(data, 0, (size_t)n_bytes);
    return data;
}

static void *weights_of(const char *path, int64_t n_bytes)
{
    void *data = memory(n_bytes);
    FILE *file = fopen(path, "rb");
    if (!file || fread(data, 1, (size_t)n_bytes, file) != (size_t)n_bytes || fgetc(file) != EOF)
        stop(path, "cannot read, or not the weights of this model");
    fclose(file);
    return data;
}

/* Values between -1 and 1 for floats (ONNX type 1); zeros are right for indices and masks. */
static void fill(const sg_tensor *tensor, void *data)
{
    float *values = data;
    unsigned state = 1;
    for (int64_t i = 0; tensor->dtype == 1 && i < tensor->n_bytes / 4; i++) {
        state = state * 1664525U + 1013904223U;
        values[i] = (float)(state >> 8) / 8388608.0F - 1.0F;
    }
}

static double now(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_total(const void *a, const void *b)
{
    const double x = ((const sg_sample *)a)->total, y = ((const sg_sample *)b)->total;
    return (x > y) - (x < y);
}

static void print_text(const char *text)
{
    putchar('"');
    for (; *text; text++)
        if (*text == '"' || *text == '\\')
            printf("\\%c", *text);
        else if ((unsigned char)*text < ' ')
            printf("\\u%04x", (unsigned)*text);
        else
            putchar(*text);
    putchar('"');
}

static void print(const sg_sample *samples, int repeats, int threads, int n_steps)
{
    const sg_sample *median = &samples[repeats / 2];
    const char *missing = "";
    printf("{\"threads\": %d, \"repeats\": %d, \"code\": %d, ", threads, repeats,
           (int)sg_code_index());
    printf("\"median_ms\": %.6f, \"min_ms\": %.6f, \"steps\": [", 1e3 * median->total,
           1e3 * samples[0].total);
    for (int i = 0; i < n_steps; i++, missing = ", ") {
        printf("%s{\"ms\": %.6f, \"nodes\": ", missing, 1e3 * median->steps[i]);
        print_text(sg_step_name(0, i));
        putchar('}');
    }
    puts("]}");
}

int main(int argc, char **argv)
{
    if (argc != 4 || atoi(argv[2]) < 1 || atoi(argv[3]) < 1)
        stop(argv[0], "usage: bench WEIGHTS THREADS REPEATS");
    if (sg_abi() != SG_ABI || sg_n_segments() != 1)
        stop("model", "not one segment of this ABI");
    if (sg_missing_feature())
        stop("the CPU lacks", sg_missing_feature());
    const int threads = atoi(argv[2]), repeats = atoi(argv[3]), n_steps = sg_n_steps(0);
    const int32_t n_inputs = sg_n_inputs(0), n_outputs = sg_n_outputs(0);
    void **inputs = memory((int64_t)sizeof(void *) * (n_inputs + 1));
    void **outputs = memory((int64_t)sizeof(void *) * (n_outputs + 1));
    for (int32_t i = 0; i < n_inputs; i++)
        fill(sg_input(0, i), inputs[i] = memory(sg_input(0, i)->n_bytes));
    for (int32_t i = 0; i < n_outputs; i++)
        outputs[i] = memory(sg_output(0, i)->n_bytes);
    void *weights = weights_of(argv[1], sg_weights_bytes());
    void *workspace = memory(sg_workspace_bytes(0, threads));
    sg_pool *pool = NULL;
    int32_t status = sg_pool_create(threads, &pool);
    sg_sample *samples = memory((int64_t)sizeof *samples * (repeats + 1));
    for (int i = 0; i <= repeats && status == SG_OK; i++) {
        samples[i].steps = memory((int64_t)sizeof(double) * (n_steps + 1));
        const double start = now();
        status = sg_profile(0, weights, workspace, (const void *const *)inputs, outputs, pool,
                            samples[i].steps);
        samples[i].total = now() - start;
    }
    if (status != SG_OK)
        stop("cannot run", sg_status_text(status));
    free(samples[0].steps);
    qsort(samples + 1, (size_t)repeats, sizeof *samples, by_total);
    print(samples + 1, repeats, threads, n_steps);
    sg_pool_destroy(pool);
    for (int i = 1; i <= repeats; i++)
        free(samples[i].steps);
    for (int32_t i = 0; i < n_inputs; i++)
        free(inputs[i]);
    for (int32_t i = 0; i < n_outputs; i++)
        free(outputs[i]);
    free(samples);
    free(inputs);
    free(outputs);
    free(weights);
    free(workspace);
    return 0;
}
