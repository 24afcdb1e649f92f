# Where boot.S jumps to, and where the program's system calls go: loader.c answers them.
.section .text.first, "ax"
  movl $0xc0000081, %ecx        # STAR: the code and stack segments of a system call
  xorl %eax, %eax
  movl $8, %edx
  wrmsr
  movl $0xc0000082, %ecx        # LSTAR: its address
  leaq entry(%rip), %rax
  xorl %edx, %edx
  wrmsr
  movl $0xc0000084, %ecx        # the flags that it clears: none
  xorl %eax, %eax
  wrmsr
  call run
entry:                          # %rcx is where to return to, %r11 the flags; all else but %rax is kept
  movq %rsp, callers(%rip)
  movl $0x1f0000, %esp
  pushq %rcx
  pushq %r11
  pushq %rdi
  pushq %rsi
  pushq %rdx
  pushq %r8
  pushq %r9
  pushq %r10
  movq %rdx, %rcx
  movq %rsi, %rdx
  movq %rdi, %rsi
  movq %rax, %rdi
  call answer
  popq %r10
  popq %r9
  popq %r8
  popq %rdx
  popq %rsi
  popq %rdi
  popq %r11
  popq %rcx
  movq callers(%rip), %rsp
  pushq %r11
  popfq
  jmp *%rcx
.data
callers:
  .quad 0
.section .note.GNU-stack, "", @progbits
