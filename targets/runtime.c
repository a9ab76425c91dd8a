/* Runs the steps that a generated driver lists, on one thread or on a pool.
 *
 * All threads walk the same list of steps. Each computes its share of the items of a step; a
 * barrier separates the steps. Shares depend on the number of items and threads alone, and an item
 * is computed by one thread, so results do not depend on timing or on the number of threads.
 */
#define _POSIX_C_SOURCE 200809L
#include "driver.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum {
    LINE = 64,        /* bytes of a cache line */
    SPINS = 1 << 12,  /* polls before a waiting thread sleeps: 50 to 100 us, a wake-up costs as much */
    MAX_THREADS = 1024
};

typedef struct {
    const sg_segment *segment; /* NULL: the workers end */
    sg_call call;
    double *seconds; /* per step, or NULL */
} sg_job;

typedef struct {
    pthread_t thread;
    sg_pool *pool;
    int32_t index;
} sg_worker;

struct sg_pool {
    _Alignas(LINE) atomic_uint phase; /* counts barriers; waiting threads read it */
    _Alignas(LINE) atomic_int arrived;
    atomic_int sleepers;
    atomic_int n_threads;
    pthread_mutex_t lock; /* with `wake`: for threads that sleep until `phase` changes */
    pthread_cond_t wake;
    pthread_mutex_t turn; /* held for one whole run */
    sg_job job;
    sg_worker workers[];
};

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

static void wait_for_next_phase(sg_pool *pool, unsigned seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->phase, memory_order_acquire) != seen)
            return;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->phase) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
}

/* Returns when all threads of the pool have called it. A sleeper counts itself before it looks at
 * the phase, and the last thread changes the phase before it looks for sleepers: none is missed. */
static void barrier(sg_pool *pool)
{
    unsigned seen = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 != atomic_load(&pool->n_threads)) {
        wait_for_next_phase(pool, seen);
        return;
    }
    atomic_store(&pool->arrived, 0);
    atomic_store(&pool->phase, seen + 1);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* First item of a thread; a single item belongs to thread 0. */
static int32_t share(int64_t items, int32_t thread, int32_t n_threads)
{
    return (int32_t)((items * thread + n_threads - 1) / n_threads);
}

static void run_steps(sg_job job, sg_pool *pool, int32_t thread, int32_t n_threads)
{
    const sg_segment *segment = job.segment;
    const int timed = job.seconds && thread == 0;
    double start = timed ? now() : 0;
    job.call.scratch += thread * segment->scratch_bytes;
    for (int32_t i = 0; i < segment->n_steps; i++) {
        const sg_step *step = &segment->steps[i];
        const int32_t begin = share(step->items, thread, n_threads);
        const int32_t end = share(step->items, thread + 1, n_threads);
        const int is_last = i + 1 == segment->n_steps;
        if (begin < end)
            step->run(&job.call, begin, end);
        /* Between two steps that both run on thread 0 nobody has to wait. */
        if (n_threads > 1 && (is_last || step[0].items > 1 || step[1].items > 1))
            barrier(pool);
        if (timed) {
            double end_time = now();
            job.seconds[i] = end_time - start;
            start = end_time;
        }
    }
}

static void *worker_main(void *argument)
{
    const sg_worker *worker = argument;
    sg_pool *pool = worker->pool;
    for (;;) {
        barrier(pool);
        sg_job job = pool->job;
        if (!job.segment)
            return NULL;
        run_steps(job, pool, worker->index, atomic_load(&pool->n_threads));
    }
}

/* Workers leave signals to the threads of the program. */
static int start_worker(sg_worker *worker)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&worker->thread, NULL, worker_main, worker);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

int32_t sg_pool_create(int32_t n_threads, sg_pool **result)
{
    if (n_threads < 1 || n_threads > MAX_THREADS || !result)
        return SG_BAD_ARGUMENT;
    *result = NULL;
    if (n_threads == 1)
        return SG_OK;
    size_t n_bytes = sizeof(sg_pool) + (size_t)(n_threads - 1) * sizeof(sg_worker);
    sg_pool *pool = aligned_alloc(LINE, (n_bytes + LINE - 1) / LINE * LINE);
    if (!pool)
        return SG_NO_MEMORY;
    atomic_init(&pool->phase, 0);
    atomic_init(&pool->arrived, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->n_threads, n_threads);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_mutex_init(&pool->turn, NULL);
    for (int32_t i = 0; i < n_threads - 1; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].index = i + 1;
        if (start_worker(&pool->workers[i])) {
            atomic_store(&pool->n_threads, i + 1); /* those that run, and the caller */
            sg_pool_destroy(pool);
            return SG_NO_THREAD;
        }
    }
    *result = pool;
    return SG_OK;
}

void sg_pool_destroy(sg_pool *pool)
{
    if (!pool)
        return;
    pool->job.segment = NULL;
    barrier(pool);
    for (int32_t i = 0; i < atomic_load(&pool->n_threads) - 1; i++)
        pthread_join(pool->workers[i].thread, NULL);
    pthread_mutex_destroy(&pool->turn);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static const sg_segment *find(int32_t segment)
{
    return segment >= 0 && segment < sg_segment_count ? &sg_segments[segment] : NULL;
}

static int any_null(const void *const *pointers, int32_t n)
{
    if (n && !pointers)
        return 1;
    for (int32_t i = 0; i < n; i++)
        if (!pointers[i])
            return 1;
    return 0;
}

int32_t sg_profile(int32_t segment, const void *weights, void *workspace,
                   const void *const *inputs, void *const *outputs, sg_pool *pool, double *seconds)
{
    const sg_segment *s = find(segment);
    if (!s || !weights || !workspace || any_null(inputs, s->n_inputs) ||
        any_null((const void *const *)outputs, s->n_outputs))
        return SG_BAD_ARGUMENT;
    if (!s->n_steps)
        return SG_OK;
    char *arena = (char *)workspace + (-(uintptr_t)workspace & (LINE - 1));
    sg_job job = {s, {weights, arena, arena + s->arena_bytes, inputs, outputs}, seconds};
    if (!pool) {
        run_steps(job, NULL, 0, 1);
        return SG_OK;
    }
    pthread_mutex_lock(&pool->turn);
    pool->job = job;
    barrier(pool);
    run_steps(job, pool, 0, atomic_load(&pool->n_threads));
    pthread_mutex_unlock(&pool->turn);
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
    if (!s || n_threads < 1 || n_threads > MAX_THREADS)
        return -1;
    return s->arena_bytes + n_threads * s->scratch_bytes + LINE;
}

const char *sg_status_text(int32_t status)
{
    switch (status) {
    case SG_OK: return "ok";
    case SG_BAD_ARGUMENT: return "no such segment, a null pointer, or threads outside 1 to 1024";
    case SG_NO_MEMORY: return "out of memory";
    case SG_NO_THREAD: return "the system refused a new thread";
    default: return "unknown status";
    }
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
