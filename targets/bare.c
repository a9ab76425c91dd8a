/* What `pool.c` takes from a POSIX system, where there is none: one thread, no clock,
 * one CPU. */
#include "driver.h"

#include <stddef.h>

int32_t sg_pool_create(int32_t n_threads, sg_pool **pool)
{
    if (n_threads < 1 || n_threads > SG_MAX_THREADS || !pool)
        return SG_BAD_ARGUMENT;
    *pool = NULL;
    return n_threads == 1 ? SG_OK : SG_NO_THREAD;
}

/* There are no pools: these are never called with one. */
void sg_pool_destroy(sg_pool *pool) { (void)pool; }
void sg_pool_barrier(sg_pool *pool) { (void)pool; }

int32_t sg_pool_threads(sg_pool *pool)
{
    (void)pool;
    return 1;
}

void sg_pool_run(sg_pool *pool, sg_work *work, const void *argument) { work(argument, pool, 0, 1); }

/* The engine or the one who builds the source sees to it that the CPU fits. */
int32_t sg_code_index(void) { return 0; }
const char *sg_missing_feature(void) { return NULL; }
const char *sg_cpu_error(void) { return ""; }

double sg_now(void) { return 0; }
