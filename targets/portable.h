/* What generated C kernels need: minima, maxima and bits without undefined behaviour. */
#ifndef SG_PORTABLE_H
#define SG_PORTABLE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __GNUC__ /* a model may compare bytes with what no byte is */
#pragma GCC diagnostic ignored "-Wtype-limits"
#endif

#define SG_MIN_MAX(name, type)                                                                   \
    static inline type sg_min_##name(type a, type b) { return a < b ? a : b; }                   \
    static inline type sg_max_##name(type a, type b) { return a > b ? a : b; }
SG_MIN_MAX(float, float)
SG_MIN_MAX(double, double)
SG_MIN_MAX(int32_t, int32_t)
SG_MIN_MAX(int64_t, int64_t)
SG_MIN_MAX(int8_t, int8_t)
SG_MIN_MAX(uint8_t, uint8_t)
#undef SG_MIN_MAX

static inline float sg_bits_float(int32_t x)
{
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}

static inline int32_t sg_bits_int32_t(float x)
{
    int32_t y;
    memcpy(&y, &x, sizeof y);
    return y;
}

/* Integers that hold bits wrap around; C leaves that undefined for signed types. */
static inline int32_t sg_wrap_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
static inline int32_t sg_wrap_sub(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }
static inline int32_t sg_wrap_mul(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }
static inline int32_t sg_shift_left(int32_t a, int32_t n) { return (int32_t)((uint32_t)a << n); }

#endif
