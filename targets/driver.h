/* Between the generated driver of a model, runtime.c and pool.c. Not a public interface. */
#ifndef SG_DRIVER_H
#define SG_DRIVER_H

#include "runtime.h"

typedef struct {
    const char *weights;
    char *arena;   /* the temporaries, at offsets fixed by the memory planner */
    char *scratch; /* of the calling thread */
    const void *const *inputs;
    void *const *outputs;
} sg_call;

typedef struct {
    void (*run)(const sg_call *call, int32_t begin, int32_t end);
    int32_t items; /* independent; threads share them */
    int32_t chain; /* steps that go item by item together, this one first; 0 within a chain */
    const char *name;
} sg_step;

typedef struct {
    const sg_tensor *inputs, *outputs;
    const sg_step *steps;
    int32_t n_inputs, n_outputs, n_steps;
    int64_t arena_bytes, scratch_bytes; /* multiples of 64; scratch of one thread */
} sg_segment;

typedef struct {
    const sg_segment *segments;  /* sg_segment_count of them */
    const char *const *features; /* that the CPU must have, in LLVM's words; NULL ends them */
} sg_code;

extern const sg_code sg_codes[]; /* the best first */
extern const int32_t sg_code_count;
extern const int32_t sg_segment_count;
extern const int64_t sg_weight_file_bytes;

enum { SG_MAX_THREADS = 1024 };

/* Done by every thread of a pool at once; must end with a barrier. Thread 0 is the caller. */
typedef void sg_work(const void *argument, sg_pool *pool, int32_t thread, int32_t n_threads);
void sg_pool_run(sg_pool *pool, sg_work *work, const void *argument);
/* Returns when all threads of the pool have called it. */
void sg_pool_barrier(sg_pool *pool);
int32_t sg_pool_threads(sg_pool *pool); /* NULL: 1 */

const char *sg_cpu_error(void); /* for people; where sg_missing_feature is not NULL */

double sg_now(void); /* seconds since any moment; 0 where there is no clock */

#endif
