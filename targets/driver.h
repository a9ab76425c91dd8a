/* What the generated driver of a model tells runtime.c. Not part of the public interface. */
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
    const char *name;
} sg_step;

typedef struct {
    const sg_tensor *inputs, *outputs;
    const sg_step *steps;
    int32_t n_inputs, n_outputs, n_steps;
    int64_t arena_bytes, scratch_bytes; /* multiples of 64; scratch of one thread */
} sg_segment;

extern const sg_segment sg_segments[];
extern const int32_t sg_segment_count;
extern const int64_t sg_weight_file_bytes;

#endif
