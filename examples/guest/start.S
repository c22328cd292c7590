/* The first instruction of the guest, and its only interrupt gate. 32-bit flat, as the VMM has set it up. */
	.section .text.start, "ax"
	.globl start
start:
	movl	$stack_end, %esp
	lgdt	segments_table		/* an interrupt reads its code segment from there */
	call	guest_main
1:	cli
	hlt
	jmp	1b

/* Back by popf and ret and not by iret, which KVM's instruction emulator does not know in protected mode. */
	.text
	.globl interrupt_gate
interrupt_gate:
	pushal
	cld
	call	on_interrupt
	popal
	pushl	%eax			/* eax, eip, cs, eflags */
	movl	12(%esp), %eax
	movl	%eax, 8(%esp)		/* eax, eip, eflags, eflags */
	movl	4(%esp), %eax
	movl	%eax, 12(%esp)		/* eax, eip, eflags, eip */
	popl	%eax
	leal	4(%esp), %esp
	popfl
	ret

	.data
	.balign	8
segments:
	.quad	0, 0x00cf9a000000ffff, 0x00cf92000000ffff
segments_table:
	.word	23
	.long	segments

	.bss
	.balign	16
	.skip	16384
stack_end:
	.section .note.GNU-stack, "", @progbits
