/* The firmware of an emulated PC that runs one program: from the reset vector straight to 64 bits.
 *
 * All memory below 4 GB is mapped to itself, vector registers are enabled, and `PROGRAM` is called.
 */
#define ROM 0xffff0000
#define HERE(label) (label - rom + ROM)
#define PML4 0x1000
#define PDPT 0x2000
#define PD 0x3000
#define EFER 0xc0000080

    .text
    .code16
rom:
    cli
    lgdtl %cs:(gdt_pointer - rom)
    mov %cr0, %eax
    or $1, %al                      /* protected mode */
    mov %eax, %cr0
    ljmpl $8, $HERE(protected)

    .code32
protected:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    movl $(PDPT + 3), PML4          /* present, writable; memory is zero after a reset */
    mov $PD + 3, %eax
    mov $PDPT, %edi
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x1000, %eax
    cmp $PD + 0x4003, %eax
    jne 1b
    mov $0x83, %eax                 /* pages of 2 MB */
    mov $PD, %edi
1:  mov %eax, (%edi)
    add $8, %edi
    add $0x200000, %eax
    jnc 1b
    mov $PML4, %eax
    mov %eax, %cr3
    mov $0x620, %eax                /* CR4: PAE, OSFXSR, OSXMMEXCPT */
    mov %eax, %cr4
    mov $EFER, %ecx
    rdmsr
    or $0x100, %eax                 /* LME */
    wrmsr
    mov $0x80000033, %eax           /* CR0: PG, NE, ET, MP, PE */
    mov %eax, %cr0
    ljmpl $24, $HERE(long_mode)

    .code64
long_mode:
    mov $1, %eax
    cpuid
    bt $26, %ecx                    /* XSAVE */
    jnc 2f
    mov %cr4, %rax
    or $0x40000, %eax               /* OSXSAVE */
    mov %rax, %cr4
    mov $0xd, %eax                  /* XCR0: what the CPU has of ... */
    xor %ecx, %ecx
    cpuid
    and $0xe7, %eax                 /* x87, SSE, AVX, masks and both halves of AVX-512 */
    xor %ecx, %ecx
    xor %edx, %edx
    xsetbv
2:  mov $PROGRAM, %eax
    mov %rax, %rsp                  /* the stack ends where the program begins */
    call *%rax
3:  hlt
    jmp 3b

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        /* code of 32 bits */
    .quad 0x00cf93000000ffff        /* data */
    .quad 0x00af9b000000ffff        /* code of 64 bits */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long HERE(gdt)

    .org 0xfff0
    .code16
    jmp rom                         /* where the CPU begins */
    .org 0x10000
