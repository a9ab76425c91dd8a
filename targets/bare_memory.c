/* The functions that compilers call on their own, for modules without a C library. Compiled with
 * -fno-builtin, so that their loops do not become calls of themselves. */
#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    char *a = to;
    const char *b = from;
    for (size_t i = 0; i < n; i++)
        a[i] = b[i];
    return to;
}

void *memmove(void *to, const void *from, size_t n)
{
    char *a = to;
    const char *b = from;
    if (a < b)
        return memcpy(to, from, n);
    while (n--)
        a[n] = b[n];
    return to;
}

void *memset(void *to, int value, size_t n)
{
    char *a = to;
    for (size_t i = 0; i < n; i++)
        a[i] = (char)value;
    return to;
}
