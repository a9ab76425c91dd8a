/* Start-up code of an emulated Cortex-M board, with the host's files through semihosting. */
#include "board.h"

enum { OPEN = 1, CLOSE = 2, WRITE0 = 4, WRITE = 5, READ = 6, EXIT = 0x18 };
enum { PAINT = 0x5ac3a55a };

extern uint32_t data_start[], data_end[], data_load[], bss_start[], bss_end[], stack_end[];
extern uint32_t stack_top[];

static uint32_t call(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void move(const char *name, uint32_t length, uint32_t mode, uint32_t operation,
                 const void *data, uint32_t n_bytes)
{
    const uint32_t file = call(OPEN, (const uint32_t[]){(uint32_t)name, mode, length});
    const uint32_t left = call(operation, (const uint32_t[]){file, (uint32_t)data, n_bytes});
    call(CLOSE, &file);
    if (left)
        leave(1);
}

void read_file(const char *name, uint32_t length, void *data, uint32_t n_bytes)
{
    move(name, length, 1, READ, data, n_bytes); /* "rb" */
}

void write_file(const char *name, uint32_t length, const void *data, uint32_t n_bytes)
{
    move(name, length, 5, WRITE, data, n_bytes); /* "wb" */
}

void leave(int status)
{
    call(EXIT, (const void *)(status ? 0x20023 : 0x20026));
    for (;;)
        ;
}

static void print_stack(void)
{
    char text[] = "stack 00000000\n";
    const uint32_t *lowest = stack_end;
    while (*lowest == PAINT)
        lowest++;
    uint32_t used = (uint32_t)(stack_top - lowest) * 4;
    for (int i = 13; i > 5; i--, used /= 10)
        text[i] = (char)('0' + used % 10);
    call(WRITE0, text);
}

static void reset(void)
{
    *(volatile uint32_t *)0xe000ed88 |= 0xf << 20; /* CPACR: the FPU and MVE */
    __asm__ volatile("dsb\n isb");
    for (uint32_t *p = stack_end, *here = __builtin_frame_address(0); p < here - 32; p++)
        *p = PAINT;
    for (uint32_t *p = data_start, *from = data_load; p < data_end; p++)
        *p = *from++;
    for (uint32_t *p = bss_start; p < bss_end; p++)
        *p = 0;
    const int status = main();
    print_stack();
    leave(status);
}

static void fault(void) { leave(1); }

__attribute__((section(".vectors"), used)) static void (*const vectors[16])(void) = {
    (void (*)(void))stack_top, reset, fault, fault, fault, fault, fault,
};
