/* Runs the steps that a generated driver lists, on one thread or on a pool.
 *
 * All threads walk the same list of steps. Each computes its share of the items of a step; a
 * barrier separates the steps. Shares depend on the number of items and threads alone, and an item
 * is computed by one thread, so results do not depend on timing or on the number of threads.
 */
#include "driver.h"

#include <stddef.h>

enum { LINE = 64 }; /* bytes of a cache line */

typedef struct {
    const sg_segment *segment;
    sg_call call;
    double *seconds; /* per step, or NULL */
} sg_job;

/* First item of a thread; a single item belongs to thread 0. */
static int32_t share(int64_t items, int32_t thread, int32_t n_threads)
{
    return (int32_t)((items * thread + n_threads - 1) / n_threads);
}

/* Seconds since `*start`, which moves on. */
static double lap(double *start)
{
    double before = *start;
    *start = sg_now();
    return *start - before;
}

/* Item by item through all steps: what one step writes is in the cache when the next reads it. */
static void run_chain(const sg_call *call, const sg_step *steps, int32_t begin, int32_t end,
                      double *seconds)
{
    double start = seconds ? sg_now() : 0;
    for (int32_t item = begin; item < end; item++)
        for (int32_t i = 0; i < steps->chain; i++) {
            steps[i].run(call, item, item + 1);
            if (seconds)
                seconds[i] += lap(&start);
        }
}

static void run_steps(const void *argument, sg_pool *pool, int32_t thread, int32_t n_threads)
{
    const sg_job *job = argument;
    const sg_segment *segment = job->segment;
    double *const seconds = thread == 0 ? job->seconds : NULL;
    sg_call call = job->call;
    call.scratch += thread * segment->scratch_bytes;
    for (int32_t i = 0; seconds && i < segment->n_steps; i++)
        seconds[i] = 0;
    for (int32_t i = 0, n = segment->n_steps, length; i < n; i += length) {
        const sg_step *step = &segment->steps[i];
        const int32_t begin = share(step->items, thread, n_threads);
        const int32_t end = share(step->items, thread + 1, n_threads);
        double start = seconds ? sg_now() : 0;
        length = step->chain;
        if (length > 1)
            run_chain(&call, step, begin, end, seconds ? seconds + i : NULL);
        else if (begin < end)
            step->run(&call, begin, end);
        /* Between two steps that both run on thread 0 nobody has to wait. */
        if (n_threads > 1 && (i + length == n || step->items > 1 || step[length].items > 1))
            sg_pool_barrier(pool);
        if (seconds && length == 1)
            seconds[i] = lap(&start);
    }
}

/* Sizes and names are also there for a CPU that runs none of the codes. */
static const sg_segment *find(int32_t segment)
{
    const int32_t i = sg_code_index();
    const sg_code *code = &sg_codes[i < 0 ? sg_code_count - 1 : i];
    return segment >= 0 && segment < sg_segment_count ? &code->segments[segment] : NULL;
}

static int any_null(const void *const *pointers, int32_t n)
{
    int found = n && !pointers;
    for (int32_t i = 0; i < n && !found; i++)
        found = !pointers[i];
    return found;
}

int32_t sg_profile(int32_t segment, const void *weights, void *workspace,
                   const void *const *inputs, void *const *outputs, sg_pool *pool, double *seconds)
{
    const sg_segment *s = find(segment);
    if (!s || !weights || !workspace || any_null(inputs, s->n_inputs) ||
        any_null((const void *const *)outputs, s->n_outputs))
        return SG_BAD_ARGUMENT;
    if (sg_code_index() < 0)
        return SG_NO_CPU;
    if (!s->n_steps)
        return SG_OK;
    char *arena = (char *)workspace + (-(uintptr_t)workspace & (LINE - 1));
    sg_job job = {s, {weights, arena, arena + s->arena_bytes, inputs, outputs}, seconds};
    if (pool)
        sg_pool_run(pool, run_steps, &job);
    else
        run_steps(&job, NULL, 0, 1);
    return SG_OK;
}

int32_t sg_run(int32_t segment, const void *weights, void *workspace, const void *const *inputs,
               void *const *outputs, sg_pool *pool)
{
    return sg_profile(segment, weights, workspace, inputs, outputs, pool, NULL);
}

int64_t sg_workspace_bytes(int32_t segment, int32_t n_threads)
{
    const sg_segment *s = find(segment);
    if (!s || n_threads < 1 || n_threads > SG_MAX_THREADS)
        return -1;
    return s->arena_bytes + n_threads * s->scratch_bytes + LINE;
}

const char *sg_status_text(int32_t status)
{
    static const char *const texts[] = {
        "ok", "no such segment, a null pointer, or threads outside 1 to 1024", "out of memory",
        "the system refused a new thread", "the CPU lacks a feature that the code needs"};
    return status >= 0 && status <= SG_NO_CPU ? texts[status] : "unknown status";
}

int32_t sg_abi(void) { return SG_ABI; }
int32_t sg_n_segments(void) { return sg_segment_count; }
int64_t sg_weights_bytes(void) { return sg_weight_file_bytes; }
int32_t sg_n_inputs(int32_t segment) { return find(segment) ? find(segment)->n_inputs : 0; }
int32_t sg_n_outputs(int32_t segment) { return find(segment) ? find(segment)->n_outputs : 0; }
int32_t sg_n_steps(int32_t segment) { return find(segment) ? find(segment)->n_steps : 0; }

const sg_tensor *sg_input(int32_t segment, int32_t i)
{
    return i >= 0 && i < sg_n_inputs(segment) ? &find(segment)->inputs[i] : NULL;
}

const sg_tensor *sg_output(int32_t segment, int32_t i)
{
    return i >= 0 && i < sg_n_outputs(segment) ? &find(segment)->outputs[i] : NULL;
}

const char *sg_step_name(int32_t segment, int32_t i)
{
    return i >= 0 && i < sg_n_steps(segment) ? find(segment)->steps[i].name : NULL;
}
