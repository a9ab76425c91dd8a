/* Runs the library of a bundle, as it is, on an emulated PC without an operating system.
 *
 * Library, weights and inputs are read from a disk. The library is loaded as a
 * dynamic linker would; it picks its code for the CPU itself. Outputs leave as hexadecimal digits, a
 * line each, through the emulator's debug port; then the number of that code.
 */
#include "runtime.h"

#include <elf.h>
#include <stddef.h>

enum { DEBUG_PORT = 0xe9, POWER_PORT = 0x8900, MOST = 16 };
enum { SECTOR = 512, DATA = 0x1f0, ERROR = 1, WANTS_DATA = 8, BUSY = 0x80, READ = 0x20, LBA = 0xe0 };

static char *const file = (char *)LIBRARY_AT, *const weights = (char *)WEIGHTS_AT;
static char *const base = (char *)IMAGE_AT; /* where the library is loaded */
static char *values = (char *)VALUES_AT;    /* inputs, then free memory */
static uint32_t next_sector;

void start(void);
void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
int strcmp(const char *a, const char *b);
size_t strlen(const char *text);
char *strncat(char *to, const char *from, size_t n);

static void out(uint16_t port, char c)
{
    __asm__ volatile("outb %0, %1" : : "a"(c), "Nd"(port));
}

static void print(const char *text)
{
    while (*text)
        out(DEBUG_PORT, *text++);
}

static _Noreturn void leave(const char *what, const char *name)
{
    print(what);
    print(name);
    print("\n");
    for (const char *c = "Shutdown"; *c; c++)
        out(POWER_PORT, *c);
    for (;;)
        __asm__ volatile("hlt");
}

static uint8_t status(void)
{
    uint8_t found;
    do
        __asm__ volatile("inb %1, %0" : "=a"(found) : "Nd"((uint16_t)(DATA + 7)));
    while (found & BUSY);
    return found;
}

/* The next `n_bytes` of the disk; every file there begins a sector. */
static void read(void *to, int64_t n_bytes)
{
    for (int64_t left = (n_bytes + SECTOR - 1) / SECTOR; left > 0; left--, next_sector++) {
        const uint8_t words[] = {1, (uint8_t)next_sector, (uint8_t)(next_sector >> 8),
                                 (uint8_t)(next_sector >> 16), (uint8_t)(LBA | next_sector >> 24),
                                 READ};
        size_t n = SECTOR / 2;
        status();
        for (uint16_t i = 0; i < sizeof words; i++)
            out(DATA + 2 + i, (char)words[i]);
        if ((status() & (ERROR | WANTS_DATA)) != WANTS_DATA)
            leave("error: ", "the disk does not answer");
        __asm__ volatile("rep insw" : "+D"(to), "+c"(n) : "d"((uint16_t)DATA) : "memory");
    }
}

void *memcpy(void *to, const void *from, size_t n)
{
    void *end = to;
    __asm__ volatile("rep movsb" : "+D"(end), "+S"(from), "+c"(n) : : "memory");
    return to;
}

void *memset(void *to, int value, size_t n)
{
    void *end = to;
    __asm__ volatile("rep stosb" : "+D"(end), "+c"(n) : "a"(value) : "memory");
    return to;
}

int strcmp(const char *a, const char *b)
{
    for (; *a && *a == *b; a++)
        b++;
    return *(const unsigned char *)a - *(const unsigned char *)b;
}

size_t strlen(const char *text)
{
    size_t n = 0;
    while (text[n])
        n++;
    return n;
}

char *strncat(char *to, const char *from, size_t n)
{
    char *end = to + strlen(to);
    while (n-- && *from)
        *end++ = *from++;
    *end = 0;
    return to;
}

static void absent(void) { leave("error: ", "a call of the system"); }

static const struct {
    const char *name;
    void *address;
} own[] = {
    {"memcpy", (void *)memcpy}, {"memset", (void *)memset},   {"strcmp", (void *)strcmp},
    {"strlen", (void *)strlen}, {"strncat", (void *)strncat},
};

static const Elf64_Sym *symbols;
static const char *names;

/* The address of a symbol of the library, or of what it takes from the system. */
static void *address(const Elf64_Sym *symbol)
{
    if (symbol->st_shndx)
        return base + symbol->st_value;
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (!strcmp(names + symbol->st_name, own[i].name))
            return own[i].address;
    return ELF64_ST_BIND(symbol->st_info) == STB_WEAK ? NULL : (void *)absent;
}

static void *function(const char *name)
{
    for (const Elf64_Sym *s = symbols; (const char *)s < names; s++)
        if (s->st_shndx && !strcmp(names + s->st_name, name))
            return base + s->st_value;
    leave("error: the library lacks ", name);
}

static void relocate(uint64_t table, uint64_t n_bytes)
{
    const Elf64_Rela *row = (const Elf64_Rela *)(base + table);
    for (size_t i = 0; i < n_bytes / sizeof *row; i++, row++) {
        char **place = (char **)(base + row->r_offset);
        const Elf64_Sym *symbol = symbols + ELF64_R_SYM(row->r_info);
        switch (ELF64_R_TYPE(row->r_info)) {
        case R_X86_64_RELATIVE: *place = base + row->r_addend; break;
        case R_X86_64_64: *place = (char *)address(symbol) + row->r_addend; break;
        case R_X86_64_GLOB_DAT:
        case R_X86_64_JUMP_SLOT: *place = address(symbol); break;
        default: leave("error: ", "a relocation of another kind");
        }
    }
}

static void load(void)
{
    read(file, LIBRARY_BYTES);
    const Elf64_Ehdr *head = (const Elf64_Ehdr *)file;
    const Elf64_Phdr *part = (const Elf64_Phdr *)(file + head->e_phoff);
    uint64_t d[64] = {0};
    for (int i = 0; i < head->e_phnum; i++, part++) {
        if (part->p_type == PT_LOAD)
            memcpy(base + part->p_vaddr, file + part->p_offset, part->p_filesz);
        if (part->p_type == PT_DYNAMIC)
            for (const Elf64_Dyn *e = (const Elf64_Dyn *)(file + part->p_offset); e->d_tag; e++)
                if (e->d_tag < 64)
                    d[e->d_tag] = e->d_un.d_val;
    }
    symbols = (const Elf64_Sym *)(base + d[DT_SYMTAB]);
    names = base + d[DT_STRTAB];
    relocate(d[DT_RELA], d[DT_RELASZ]);
    relocate(d[DT_JMPREL], d[DT_PLTRELSZ]);
    void (**first)(void) = (void (**)(void))(base + d[DT_INIT_ARRAY]);
    for (size_t i = 0; i < d[DT_INIT_ARRAYSZ] / sizeof *first; i++)
        first[i]();
}

/* The next `n_bytes` of memory, whole sectors. */
static char *take(int64_t n_bytes)
{
    char *found = values;
    values += (n_bytes + SECTOR - 1) / SECTOR * SECTOR;
    return found;
}

static void print_hexadecimal(const char *data, int64_t n_bytes)
{
    print("output ");
    for (int64_t i = 0; i < n_bytes; i++) {
        out(DEBUG_PORT, "0123456789abcdef"[data[i] >> 4 & 15]);
        out(DEBUG_PORT, "0123456789abcdef"[data[i] & 15]);
    }
    out(DEBUG_PORT, '\n');
}

__attribute__((section(".start"))) void start(void)
{
    const void *inputs[MOST];
    void *outputs[MOST];
    load();
    const int32_t n_in = ((__typeof__(&sg_n_inputs))function("sg_n_inputs"))(0);
    const int32_t n_out = ((__typeof__(&sg_n_outputs))function("sg_n_outputs"))(0);
    const __typeof__(&sg_input) input = (__typeof__(&sg_input))function("sg_input");
    const __typeof__(&sg_output) output = (__typeof__(&sg_output))function("sg_output");
    const int64_t n_weights = ((__typeof__(&sg_weights_bytes))function("sg_weights_bytes"))();
    const int64_t n_workspace =
        ((__typeof__(&sg_workspace_bytes))function("sg_workspace_bytes"))(0, 1);
    read(weights, n_weights);
    if (n_in > MOST || n_out > MOST)
        leave("error: ", "more inputs or outputs than there is room for");
    for (int32_t i = 0; i < n_in; i++)
        read((char *)(inputs[i] = take(input(0, i)->n_bytes)), input(0, i)->n_bytes);
    for (int32_t i = 0; i < n_out; i++)
        outputs[i] = take(output(0, i)->n_bytes);
    sg_instance model;
    if (((__typeof__(&sg_init))function("sg_init"))(&model, weights, n_weights, take(n_workspace),
                                                    n_workspace) ||
        ((__typeof__(&sg_instance_run))function("sg_instance_run"))(&model, inputs, outputs, NULL))
        leave("error: ", ((__typeof__(&sg_last_error))function("sg_last_error"))(&model));
    for (int32_t i = 0; i < n_out; i++)
        print_hexadecimal(outputs[i], output(0, i)->n_bytes);
    print("code ");
    out(DEBUG_PORT, (char)('0' + ((__typeof__(&sg_code_index))function("sg_code_index"))()));
    leave("", "");
}
