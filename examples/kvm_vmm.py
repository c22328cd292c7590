"""A VMM in one file: KVM, the standard library, and a balloon.

It builds a guest of 64 MiB from examples/guest, a balloon driver that runs on nothing else, boots it on one
vCPU and prints what the host holds for it: python examples/kvm_vmm.py [--exits]

QueueNotify is an ioeventfd that a worker waits on, and the interrupt is an irqfd. With --exits each kick is
an exit instead, and the queue is served within it, in the vCPU's thread.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import mmap
import os
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from balloon import Balloon, Effect, GuestMemory, VirtioMmio, Worker

RAM = 64 << 20
LOAD = 1 << 20
WINDOW = 0xD0000000
TSS = 0x70000000  # three pages that KVM takes for itself on some processors
LINE = 5
SERIAL, EXIT_PORT = 0x3F8, 0xF4

# <linux/kvm.h>
CREATE_VM, GET_VCPU_MMAP_SIZE, CREATE_VCPU, SET_TSS_ADDR, CREATE_IRQCHIP, RUN = (
    0xAE01, 0xAE04, 0xAE41, 0xAE47, 0xAE60, 0xAE80,
)  # fmt: skip
SET_MEMORY, IRQFD, IOEVENTFD = 0x4020AE46, 0x4020AE76, 0x4040AE79
SET_REGS, GET_SREGS, SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
EXIT_IO, EXIT_MMIO = 2, 6
DATAMATCH = 1


def build(folder: Path) -> bytes:
    """Compile the guest; returns what is to lie at LOAD."""
    source = Path(__file__).parent / "guest"
    program, image = folder / "guest.elf", folder / "guest.bin"
    command = ["gcc", "-m32", "-ffreestanding", "-mgeneral-regs-only", "-O2", "-Wall", "-Werror", "-static"]
    command += ["-nostdlib", "-fno-pic", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"]
    command += [f"-Wl,--build-id=none,-T,{source / 'guest.ld'}", "-o", str(program)]
    subprocess.run([*command, str(source / "start.S"), str(source / "balloon.c")], check=True)
    subprocess.run(["objcopy", "-O", "binary", str(program), str(image)], check=True)
    return image.read_bytes()


class Machine:
    """One vCPU, RAM, a serial port, and the register window of a device."""

    def __init__(self, memory: GuestMemory, window: VirtioMmio, irqfd: int) -> None:
        self.memory = memory
        self.window = window
        self.lines: queue.SimpleQueue[tuple[str, int] | int] = queue.SimpleQueue()
        self._text = ""
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(kvm, CREATE_VM, 0)
        fcntl.ioctl(self.vm, SET_TSS_ADDR, TSS)
        fcntl.ioctl(self.vm, CREATE_IRQCHIP, 0)
        for slot, region in enumerate(memory.regions):
            where = region.guest_address, region.size, region.host_address
            fcntl.ioctl(self.vm, SET_MEMORY, struct.pack("=IIQQQ", slot, 0, *where))
        fcntl.ioctl(self.vm, IRQFD, struct.pack("=II24x", irqfd, LINE))
        for number, fd in enumerate(window.notify_eventfds):
            notify = struct.pack("=QQIiI36x", number, WINDOW + 0x50, 4, fd, DATAMATCH)
            fcntl.ioctl(self.vm, IOEVENTFD, notify)
        self.vcpu = fcntl.ioctl(self.vm, CREATE_VCPU, 0)
        self.run_area = mmap.mmap(self.vcpu, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE, 0))
        os.close(kvm)
        self._reset()

    def _reset(self) -> None:
        """32 bits, flat, no paging: the guest begins at LOAD."""
        sregs = bytearray(fcntl.ioctl(self.vcpu, GET_SREGS, bytes(312)))
        code = struct.pack("=QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 8, 11, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        data = struct.pack("=QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        sregs[:144] = code + 5 * data
        (cr0,) = struct.unpack_from("=Q", sregs, 224)
        struct.pack_into("=Q", sregs, 224, cr0 | 1)
        fcntl.ioctl(self.vcpu, SET_SREGS, bytes(sregs))
        fcntl.ioctl(self.vcpu, SET_REGS, struct.pack("=18Q", *[0] * 16, LOAD, 2))

    def run(self) -> None:
        """The vCPU's thread. What comes of it: lines with what the host held then, at last an exit code."""
        try:
            code: str | int | None = None
            while code is None:
                with contextlib.suppress(InterruptedError):
                    fcntl.ioctl(self.vcpu, RUN, 0)
                    code = self._exit()
        except Exception as error:
            code = f"the vCPU's thread: {error!r}"
        self.lines.put(code if isinstance(code, int) else (f"FAILED: {code}", 0))

    def _exit(self) -> str | int | None:
        """One exit of the vCPU; returns how the guest has ended, once it has."""
        area = self.run_area
        (reason,) = struct.unpack_from("=I", area, 8)
        if reason == EXIT_MMIO:
            address, data, size, is_write = struct.unpack_from("=Q8sIB", area, 32)
            offset = address - WINDOW
            if not 0 <= offset < self.window.SIZE:
                return f"no device at {address:#x}"
            if is_write:
                self.window.write(offset, size, int.from_bytes(data[:size], "little"))
            else:
                value = self.window.read(offset, size)
                area[40 : 40 + size] = value.to_bytes(size, "little")
        elif reason == EXIT_IO:
            is_write, size, port, count, at = struct.unpack_from("=BBHIQ", area, 32)
            if is_write and port == EXIT_PORT:
                return int(area[at])
            if is_write and port == SERIAL:
                self._print(area[at : at + size * count].decode("latin-1"))
        else:
            return f"KVM_RUN ended with reason {reason}"
        return None

    def _print(self, text: str) -> None:
        self._text += text
        while "\n" in self._text:
            line, _, self._text = self._text.partition("\n")
            self.lines.put((line, self.memory.resident_bytes()))

    def close(self) -> None:
        self.run_area.close()
        os.close(self.vcpu)
        os.close(self.vm)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--exits", action="store_true", help="serve queues within exits, without a worker")
    exits = parser.parse_args().exits
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("/dev/kvm is not there, or not for this user")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        image = build(Path(folder))
    ram = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ram.madvise(mmap.MADV_NOHUGEPAGE)  # so that a page is a page in what is shown
    ram[LOAD : LOAD + len(image)] = image
    memory = GuestMemory(ram)
    device = Balloon(memory)
    irqfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    worker = None if exits else Worker()
    window = VirtioMmio(device, interrupt=irqfd, worker=worker)
    machine = Machine(memory, window, irqfd)
    vcpu = threading.Thread(target=machine.run, name="vcpu", daemon=True)
    vcpu.start()

    code: int | None = None
    until = time.monotonic() + 60
    answered = False
    while code is None and time.monotonic() < until:
        # Here a real VMM waits for worker.event_fd, call_eventfd and whatever else it has.
        for kind, of, _ in worker.take_events() if worker else ():
            window.on_event(kind, of)
        window.poll()
        if window.take_effects() & Effect.STATS and device.stats and device.stats.token and not answered:
            answered = True
            free, total = (device.stats.free_bytes or 0) >> 20, (device.stats.total_bytes or 0) >> 20
            print(f"  statistics: {free} of {total} MiB are free")
        try:
            said = machine.lines.get(timeout=0.01)
        except queue.Empty:
            continue
        if isinstance(said, int):
            code = said
            break
        line, resident = said
        print(f"guest: {line:<20} the host holds {resident / (1 << 20):5.1f} MiB", flush=True)
        if line.startswith("FAILED"):
            break
        if line == "reported":
            window.apply(device.set_target(8 << 20))
        elif line == "balloon 8 MiB":
            window.apply(device.set_target(0))
        elif line == "balloon 0 MiB":
            window.apply(device.request_stats(time.monotonic())[1])
    print("the guest has ended" if code == 0 else f"the guest has not ended as it should: {code}")
    if code is not None:
        vcpu.join()
        machine.close()
        window.close()
    if worker:
        worker.close()
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
