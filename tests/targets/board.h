/* What programs for the emulated boards may call. */
#ifndef BOARD_H
#define BOARD_H
#include <stdint.h>

int main(void);
void read_file(const char *name, uint32_t length, void *data, uint32_t n_bytes);
void write_file(const char *name, uint32_t length, const void *data, uint32_t n_bytes);
_Noreturn void leave(int status);

#endif
