"""A VMM without KVM: the guest of kvm_vmm.py, run by the emulator Unicorn, on every machine.

One thread does it all: it emulates, serves the balloon's queues within the accesses, and asks the guest for
things when it has said something: python examples/unicorn_vmm.py, after pip install unicorn.

Unicorn has no interrupt input. So the guest runs in slices, and between two of them, where an interrupt is
due and the guest takes interrupts, the VMM does what a processor would: it pushes the frame and goes on at
the gate.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time

from kvm_vmm import EXIT_PORT, LINE, LOAD, RAM, SERIAL, WINDOW, follow, show_stats, small_ram
from unicorn import UC_ARCH_X86, UC_HOOK_INSN, UC_MODE_32, UC_PROT_ALL, Uc, UcError
from unicorn import x86_const as x86

from balloon import Balloon, GuestMemory, VirtioMmio

INTERRUPTS_ON = 1 << 9  # IF, in EFLAGS
SLICE = 1000  # instructions: so late may an interrupt be


class InterruptController:
    """As much of an 8259 as one line needs: edge-triggered, with its first vector and mask from the guest."""

    def __init__(self, line: int) -> None:
        self.line = line
        self._vectors = 0
        self._masked = True
        self._requested = self._in_service = False
        self._words = 0  # of the initialisation, that are still to come

    def set_level(self, level: bool) -> None:
        if level:
            self._requested = True

    @property
    def is_due(self) -> bool:
        return self._requested and not self._masked and not self._in_service

    def take(self) -> int:
        """The processor takes the interrupt: returns its vector."""
        self._requested, self._in_service = False, True
        return self._vectors + self.line

    def write(self, port: int, value: int) -> None:
        if port == 0x20 and value & 0x10:  # the first word of four
            self._requested = self._in_service = False
            self._words = 3
        elif port == 0x20 and value & 0x20:  # end of interrupt
            self._in_service = False
        elif port == 0x21 and self._words:
            if self._words == 3:
                self._vectors = value & 0xF8
            self._words -= 1
        elif port == 0x21:
            self._masked = bool(value >> self.line & 1)


class Machine:
    """A processor, RAM, an interrupt controller, a serial port, and the register window of a device."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.interrupts = InterruptController(LINE)
        self.window = VirtioMmio(Balloon(memory), interrupt=self.interrupts.set_level)
        self.code: int | None = None
        self._text = ""
        self.uc = Uc(UC_ARCH_X86, UC_MODE_32)  # flat, as the guest wants it
        for region in memory.regions:  # the same pages: what is discarded is so for it too
            self.uc.mem_map_ptr(region.guest_address, region.size, UC_PROT_ALL, region.host_address)
        self.uc.mmio_map(WINDOW, mmap.PAGESIZE, self._read, None, self._write, None)
        self.uc.hook_add(UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)

    def run(self, seconds: float) -> int | None:
        """Run the guest from LOAD on; returns the code with which it ends, or None if it does not in time."""
        until = time.monotonic() + seconds
        at = LOAD
        while self.code is None and time.monotonic() < until:
            self.uc.emu_start(at, RAM, count=SLICE)  # at the end of RAM there is nothing to reach
            if self.window.pending:
                self.window.poll()
            takes_interrupts = self.uc.reg_read(x86.UC_X86_REG_EFLAGS) & INTERRUPTS_ON
            if takes_interrupts and self.interrupts.is_due:
                self._interrupt(self.interrupts.take())
            at = self.uc.reg_read(x86.UC_X86_REG_EIP)
        return self.code

    def _interrupt(self, vector: int) -> None:
        """Push EFLAGS, CS and EIP, and go on at the gate, with interrupts off. CS is flat and stays."""
        uc = self.uc
        table = uc.reg_read(x86.UC_X86_REG_IDTR)[1]
        low, _, _, high = struct.unpack("<4H", uc.mem_read(table + 8 * vector, 8))
        flags = uc.reg_read(x86.UC_X86_REG_EFLAGS)
        frame = uc.reg_read(x86.UC_X86_REG_EIP), uc.reg_read(x86.UC_X86_REG_CS), flags
        top = uc.reg_read(x86.UC_X86_REG_ESP) - 12 & 0xFFFFFFFF
        uc.mem_write(top, struct.pack("<3I", *frame))
        uc.reg_write(x86.UC_X86_REG_ESP, top)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, flags & ~INTERRUPTS_ON)
        uc.reg_write(x86.UC_X86_REG_EIP, high << 16 | low)

    def _read(self, uc: Uc, offset: int, size: int, data: object) -> int:
        return self.window.read(offset, size)

    def _write(self, uc: Uc, offset: int, size: int, value: int, data: object) -> None:
        self.window.write(offset, size, value)
        show_stats(self.window)

    def _out(self, uc: Uc, port: int, size: int, value: int, data: object) -> None:
        if port == SERIAL:
            self._text += chr(value & 0xFF)
            if self._text.endswith("\n"):
                follow(self._text[:-1], self.memory, self.window)
                self._text = ""
        elif port == EXIT_PORT:
            self.code = value & 0xFF
            uc.emu_stop()
        else:
            self.interrupts.write(port, value)


def main() -> int:
    machine = Machine(GuestMemory(small_ram()))
    code: int | UcError | None
    try:
        code = machine.run(seconds=60)
    except UcError as error:  # the guest has gone where there is nothing
        code = error
    machine.window.close()
    print("the guest has ended" if code == 0 else f"the guest has not ended as it should: {code}")
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
