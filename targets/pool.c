/* Threads that do the same work side by side: between two works they wait at a barrier. And the
 * clock: all that the runtime takes from a POSIX system. `bare.c` replaces it where there is none. */
#define _POSIX_C_SOURCE 200809L
#include "driver.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum {
    LINE = 64,    /* bytes of a cache line */
    SPINS = 2048, /* polls before a waiting thread offers its core: 40 us, as long as a wake-up */
    YIELDS = 64   /* polls before it sleeps */
};

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
    pthread_mutex_t turn; /* held for one whole work */
    sg_work *work;        /* NULL: the workers end */
    const void *argument;
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
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (atomic_load_explicit(&pool->phase, memory_order_acquire) != seen)
            return;
        if (i < SPINS)
            relax();
        else
            sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->phase) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
}

/* A sleeper counts itself before it looks at
 * the phase, and the last thread changes the phase before it looks for sleepers: none is missed. */
void sg_pool_barrier(sg_pool *pool)
{
    unsigned seen = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 != atomic_load(&pool->n_threads))
        return wait_for_next_phase(pool, seen);
    atomic_store(&pool->arrived, 0);
    atomic_store(&pool->phase, seen + 1);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
}

static void *worker_main(void *argument)
{
    const sg_worker *worker = argument;
    sg_pool *pool = worker->pool;
    for (;;) {
        sg_pool_barrier(pool);
        if (!pool->work)
            return NULL;
        pool->work(pool->argument, pool, worker->index, atomic_load(&pool->n_threads));
    }
}

void sg_pool_run(sg_pool *pool, sg_work *work, const void *argument)
{
    pthread_mutex_lock(&pool->turn);
    pool->work = work;
    pool->argument = argument;
    sg_pool_barrier(pool);
    work(argument, pool, 0, atomic_load(&pool->n_threads));
    pthread_mutex_unlock(&pool->turn);
}

int32_t sg_pool_threads(sg_pool *pool) { return pool ? atomic_load(&pool->n_threads) : 1; }

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
    if (n_threads < 1 || n_threads > SG_MAX_THREADS || !result)
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
    pool->work = NULL;
    sg_pool_barrier(pool);
    for (int32_t i = 0; i < atomic_load(&pool->n_threads) - 1; i++)
        pthread_join(pool->workers[i].thread, NULL);
    pthread_mutex_destroy(&pool->turn);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

double sg_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
