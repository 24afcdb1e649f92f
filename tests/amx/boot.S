# The first sector of the disk: reads CHUNKS pieces of 32 KiB behind it to 0x3f0000 and runs them in 64-bit mode, with
# the first 4 GiB at their own addresses and the state of AVX-512 and of tiles switched on.
.code16
.globl _start
_start:
  xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %ss
  movw $0x7c00, %sp
  movw $CHUNKS, %bp
read:
  movw $packet, %si
  movb $0x42, %ah               # of the disk that the BIOS named in %dl, to 0x20000
  int $0x13
  jc read
  movw %ds, %ax
  movw %ax, %es
  movw $moves, %si
  movw $0x4000, %cx
  movb $0x87, %ah               # from there to where it belongs, above 1 MiB
  int $0x15
  addl $64, sector
  addl $0x8000, target
  movb target + 3, %al          # the descriptor has the address in bytes 2 to 4 and 7
  movb %al, moves + 31
  movl target, %eax
  andl $0x00ffffff, %eax
  orl $0x93000000, %eax
  movl %eax, moves + 26
  decw %bp
  jnz read

  cli
  movw $0x1000, %ax             # page tables: 0x10000, 0x11000, and four of 2 MiB pages behind them
  movw %ax, %es
  xorl %eax, %eax
  xorl %edi, %edi
  movl $0x1800, %ecx
  cld
  rep stosl
  movl $0x11007, %es:0
  movl $0x12007, %es:0x1000
  movl $0x13007, %es:0x1008
  movl $0x14007, %es:0x1010
  movl $0x15007, %es:0x1018
  movw $0x2000, %di
  movl $0x87, %eax
page:
  movl %eax, %es:(%di)
  addw $8, %di
  addl $0x200000, %eax
  cmpw $0x6000, %di
  jne page
  movl $0x10000, %eax
  movl %eax, %cr3
  movl %cr4, %eax
  orl $0x40620, %eax            # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
  movl %eax, %cr4
  movl $0xc0000080, %ecx        # EFER: long mode, syscall
  rdmsr
  orl $0x101, %eax
  wrmsr
  lgdt table
  movl %cr0, %eax
  andl $0xfffffffb, %eax
  orl $0x80000003, %eax
  movl %eax, %cr0
  ljmpl $8, $long_mode
.code64
long_mode:
  movw $16, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  xorl %ecx, %ecx
  xorl %edx, %edx
  movl $0x600e7, %eax           # XCR0: x87, SSE, AVX, AVX-512, tiles
  xsetbv
  movl $0x1f0000, %esp
  movl $0x3f0000, %eax
  jmp *%rax

packet:
  .word 16, 64, 0, 0x2000
sector:
  .quad 1
target:
  .long 0x3f0000
moves:
  .quad 0, 0, 0x000093020000ffff, 0x0000933f0000ffff, 0, 0
descriptors:
  .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
table:
  .word 23
  .long descriptors
.org 510
  .word 0xaa55
