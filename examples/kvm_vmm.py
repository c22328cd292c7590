"""A VMM in one file: KVM, the standard library, and a balloon.

python examples/kvm_vmm.py [--exits]
    builds a guest of 64 MiB from examples/guest, a balloon driver that runs on nothing else, boots it on one
    vCPU and prints what the host holds for it. Its device is a virtio-mmio window.

python examples/kvm_vmm.py --kernel /boot/vmlinuz-… --initrd initrd.gz
    boots a Linux as it comes from a distribution, on one vCPU with a serial console. It finds its balloon on
    the PCI bus. examples/linux_initrd.py makes an initrd that frees memory.

Kicks are ioeventfds that a worker waits on, and interrupts are irqfds. With --exits each kick is an exit
instead, and the queue is served within it, in the vCPU's thread.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from balloon import Balloon, Effect, GuestMemory, VirtioMmio, VirtioPci, Worker

MIB = 1 << 20
RAM = 64 * MIB
LOAD = 1 * MIB
WINDOW = 0xD0000000
LINE = 5
SERIAL, EXIT_PORT, PCI_ADDRESS, PCI_DATA, CLOCK = 0x3F8, 0xF4, 0xCF8, 0xCFC, 0x71
SERIAL_LINE = 4
HOLE, ABOVE = 0x70000000, 4 << 30  # there is no RAM between these: devices lie there
BAR = 0xE0000000
TSS, IDENTITY_MAP = HOLE, HOLE + 0x3000  # pages that KVM takes for itself on some processors

# <linux/kvm.h>
CREATE_VM, GET_VCPU_MMAP_SIZE, CREATE_VCPU, SET_TSS_ADDR, CREATE_IRQCHIP, RUN = (
    0xAE01, 0xAE04, 0xAE41, 0xAE47, 0xAE60, 0xAE80,
)  # fmt: skip
SET_MEMORY, IRQFD, IOEVENTFD = 0x4020AE46, 0x4020AE76, 0x4040AE79
SET_REGS, GET_SREGS, SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
SET_IDENTITY_MAP, CREATE_PIT, SET_ROUTING = 0x4008AE48, 0x4040AE77, 0x4008AE6A
GET_SUPPORTED_CPUID, SET_CPUID = 0xC008AE05, 0x4008AE90
EXIT_IO, EXIT_MMIO, EXIT_SHUTDOWN = 2, 6, 8
DATAMATCH, DEASSIGN = 1, 4
ROUTE_PIN, ROUTE_MSI = 1, 2


class Machine:
    """One vCPU, RAM, and the interrupt controllers of a PC; a subclass has the devices."""

    transport: VirtioMmio | VirtioPci

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.code: str | int | None = None  # how it has ended
        self.news = os.eventfd(0, os.EFD_CLOEXEC)  # it has said something, or ended
        self._text = ""
        self._irqfds: list[int] = []
        self._thread = threading.Thread(target=self._run, name="vcpu", daemon=True)
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(self.kvm, CREATE_VM, 0)
        fcntl.ioctl(self.vm, SET_IDENTITY_MAP, struct.pack("=Q", IDENTITY_MAP))
        fcntl.ioctl(self.vm, SET_TSS_ADDR, TSS)
        fcntl.ioctl(self.vm, CREATE_IRQCHIP, 0)
        for slot, region in enumerate(memory.regions):
            where = region.guest_address, region.size, region.host_address
            fcntl.ioctl(self.vm, SET_MEMORY, struct.pack("=IIQQQ", slot, 0, *where))
        self.vcpu = fcntl.ioctl(self.vm, CREATE_VCPU, 0)
        self.run_area = mmap.mmap(self.vcpu, fcntl.ioctl(self.kvm, GET_VCPU_MMAP_SIZE, 0))

    def irqfd(self, line: int) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._irqfds.append(fd)
        fcntl.ioctl(self.vm, IRQFD, struct.pack("=II24x", fd, line))
        return fd

    def ioeventfd(self, fd: int, address: int, size: int, flags: int = 0, value: int = 0) -> None:
        fcntl.ioctl(self.vm, IOEVENTFD, struct.pack("=QQIiI36x", value, address, size, fd, flags))

    def set_registers(self, segments: bytes, control: dict[int, int], *, rip: int, rsi: int = 0) -> None:
        """`segments` are CS and the data segments; `control` has values by their place in kvm_sregs."""
        sregs = bytearray(fcntl.ioctl(self.vcpu, GET_SREGS, bytes(312)))
        sregs[: len(segments)] = segments
        for place, value in control.items():
            struct.pack_into("=Q", sregs, place, value)
        fcntl.ioctl(self.vcpu, SET_SREGS, bytes(sregs))
        fcntl.ioctl(self.vcpu, SET_REGS, struct.pack("=18Q", *[0] * 4, rsi, *[0] * 11, rip, 2))

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        """The vCPU's thread."""
        try:
            while self.code is None:
                with contextlib.suppress(InterruptedError):
                    fcntl.ioctl(self.vcpu, RUN, 0)
                    self._exit()
        except Exception as error:
            self.code = f"the vCPU's thread: {error!r}"
        os.eventfd_write(self.news, 1)

    def _exit(self) -> None:
        area = self.run_area
        (reason,) = struct.unpack_from("=I", area, 8)
        if reason == EXIT_MMIO:
            address, data, size, is_write = struct.unpack_from("=Q8sIB", area, 32)
            if is_write:
                self.mmio_write(address, size, int.from_bytes(data[:size], "little"))
            else:
                area[40 : 40 + size] = self.mmio_read(address, size).to_bytes(size, "little")
        elif reason == EXIT_IO:
            is_write, size, port, count, at = struct.unpack_from("=BBHIQ", area, 32)
            for place in range(at, at + size * count, size):
                if is_write:
                    self.port_write(port, size, int.from_bytes(area[place : place + size], "little"))
                else:
                    area[place : place + size] = self.port_read(port, size).to_bytes(size, "little")
        elif reason == EXIT_SHUTDOWN:
            self.code = self.on_shutdown()
        else:
            self.code = f"KVM_RUN ended with reason {reason}"

    # What a subclass has to say. What is not there reads as all ones.

    def mmio_read(self, address: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int) -> None:
        pass

    def port_read(self, port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        if port == SERIAL:
            self.send(chr(value & 0xFF))

    def on_shutdown(self) -> str | int:
        return "a triple fault"

    def on_line(self, line: str) -> None:
        print(line, flush=True)

    def send(self, character: str) -> None:
        """The serial port: what is not printed holds the vCPU, so that no guest fills our memory."""
        if character != "\n" and len(self._text) < 1000:
            self._text += character
            return
        line, self._text = self._text.rstrip("\r"), ""
        self.on_line(line)
        os.eventfd_write(self.news, 1)

    def wait(self, seconds: float) -> None:
        """Wait until there is something to do, and do what is the device's."""
        worker = self.transport.worker
        fds = [self.news, *([worker.event_fd] if worker else []), self.transport.call_eventfd]
        seconds = 0 if self.transport.pending else seconds
        ready, _, _ = select.select([fd for fd in fds if fd >= 0], [], [], seconds)
        if self.news in ready:
            os.eventfd_read(self.news)
        for kind, of, _ in worker.take_events() if worker else ():
            self.transport.on_event(kind, of)
        self.transport.poll()

    def close(self) -> None:
        """Once it has ended."""
        self._thread.join()
        self.transport.close()
        self.run_area.close()
        for fd in (self.vcpu, self.vm, self.kvm, self.news, *self._irqfds):
            os.close(fd)


# A guest of our own.


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


def segment(selector: int, kind: int, *, is_32: bool = True, is_64: bool = False) -> bytes:
    """A flat kvm_segment."""
    return struct.pack("=QIHBBBBBBBBBB", 0, 0xFFFFFFFF, selector, kind, 1, 0, is_32, 1, is_64, 1, 0, 0, 0)


def small_ram() -> mmap.mmap:
    """RAM with that guest in it."""
    with tempfile.TemporaryDirectory() as folder:
        image = build(Path(folder))
    ram = mmap.mmap(-1, RAM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ram.madvise(mmap.MADV_NOHUGEPAGE)  # so that a page is a page in what is shown
    ram[LOAD : LOAD + len(image)] = image
    return ram


def follow(line: str, memory: GuestMemory, window: VirtioMmio) -> None:
    """That guest has printed a line: what the host holds now, and what the guest is asked for next."""
    print(f"guest: {line:<20} the host holds {memory.resident_bytes() / MIB:5.1f} MiB", flush=True)
    if line == "reported":
        window.apply(window.device.set_target(8 * MIB))
    elif line == "balloon 8 MiB":
        window.apply(window.device.set_target(0))
    elif line == "balloon 0 MiB":
        window.apply(window.device.request_stats(time.monotonic())[1])


def show_stats(window: VirtioMmio) -> bool:
    """Show the guest's answer, if it has come."""
    stats = window.device.stats
    if not window.take_effects() & Effect.STATS or stats is None or not stats.token:
        return False
    free, total = (stats.free_bytes or 0) >> 20, (stats.total_bytes or 0) >> 20
    print(f"  statistics: {free} of {total} MiB are free")
    return True


class Small(Machine):
    """The machine of examples/guest: a register window, and a port that ends it."""

    def __init__(self, memory: GuestMemory, worker: Worker | None) -> None:
        super().__init__(memory)
        self.window = VirtioMmio(Balloon(memory), interrupt=self.irqfd(LINE), worker=worker)
        self.transport = self.window
        for number, fd in enumerate(self.window.notify_eventfds):
            self.ioeventfd(fd, WINDOW + 0x50, 4, DATAMATCH, number)
        # 32 bits, flat, no paging: the guest begins at LOAD.
        self.set_registers(segment(8, 11) + 5 * segment(16, 3), {224: 0x11}, rip=LOAD)

    def mmio_read(self, address: int, size: int) -> int:
        if 0 <= address - WINDOW < self.window.SIZE:
            return self.window.read(address - WINDOW, size)
        self.code = f"no device at {address:#x}"
        return 0

    def mmio_write(self, address: int, size: int, value: int) -> None:
        if 0 <= address - WINDOW < self.window.SIZE:
            self.window.write(address - WINDOW, size, value)
        else:
            self.code = f"no device at {address:#x}"

    def port_write(self, port: int, size: int, value: int) -> None:
        if port == EXIT_PORT:
            self.code = value
        else:
            super().port_write(port, size, value)

    def on_line(self, line: str) -> None:
        follow(line, self.memory, self.window)


def run_small(worker: Worker | None) -> int:
    machine = Small(GuestMemory(small_ram()), worker)
    machine.start()
    until = time.monotonic() + 60
    has_ended = has_answered = False
    while not (has_ended and has_answered) and time.monotonic() < until:
        machine.wait(0.1)
        has_answered = has_answered or show_stats(machine.window)
        if machine.code is not None and not has_ended:
            has_ended = True
            until = time.monotonic() + 2  # a worker may still be at what the guest has kicked last
    code = machine.code
    print("the guest has ended" if code == 0 else f"the guest has not ended as it should: {code}")
    if has_ended:
        machine.close()
    return 0 if code == 0 else 1


# A Linux.


class Uart:
    """A serial port of a PC that has always sent what it was given; nothing comes in."""

    def __init__(self, irqfd: int) -> None:
        self.irqfd = irqfd
        self.registers = bytearray(8)
        self.divisor = bytearray(2)
        self.is_empty = False  # the interrupt that says so is due

    def read(self, register: int) -> int:
        if register < 2 and self.registers[3] & 0x80:
            return self.divisor[register]
        if register == 2:
            due, self.is_empty = self.is_empty and bool(self.registers[1] & 2), False
            return 0xC2 if due else 0xC1
        return {0: 0, 5: 0x60, 6: 0xB0}.get(register, self.registers[register])

    def write(self, register: int, value: int) -> str:
        """Returns what was sent."""
        if register < 2 and self.registers[3] & 0x80:
            self.divisor[register] = value
            return ""
        self.registers[register] = value
        if register in (0, 1):
            self.is_empty = True
            if self.registers[1] & 2:
                os.eventfd_write(self.irqfd, 1)
        return chr(value) if register == 0 else ""


class Pc(Machine):
    """What Linux needs of a PC: a timer, a serial port, and a bus with one function on it."""

    def __init__(self, memory: GuestMemory, device: Balloon, worker: Worker | None) -> None:
        super().__init__(memory)
        fcntl.ioctl(self.vm, CREATE_PIT, struct.pack("=I60x", 1))
        self._set_cpuid()
        self.uart = Uart(self.irqfd(SERIAL_LINE))
        self.address = 0
        self.bridge = struct.pack("<HHHHBBBB", 0x8086, 0x1237, 0, 0, 0, 0, 0, 6).ljust(256, b"\0")
        # A message signalled interrupt is a line too, from the 24th on, once `route` has said what it means.
        self.messages: dict[int, tuple[int, int]] = {}
        fds = [self.irqfd(24 + vector) for vector in range(6)]
        self.function = VirtioPci(device, vector_fds=fds, route=self._route, worker=worker, vectors=len(fds))
        self.transport = self.function
        # This is what firmware does on a bus: it gives the BAR its place.
        self.function.config_write(0x10, 4, BAR)
        self.notified_at: int | None = None

    def _set_cpuid(self) -> None:
        """The guest's processor is what KVM can give it, and the first of its kind."""
        found = bytearray(8 + 40 * 256)
        struct.pack_into("=I", found, 0, 256)
        fcntl.ioctl(self.kvm, GET_SUPPORTED_CPUID, found)
        for place in range(8, 8 + 40 * struct.unpack_from("=I", found)[0], 40):
            leaf, _, _, _, ebx, ecx = struct.unpack_from("=6I", found, place)
            if leaf == 1:
                ecx |= 1 << 31 | 1 << 24  # there is a hypervisor, and a timer of its TSC
                struct.pack_into("=II", found, place + 16, ebx & 0xFFFF, ecx)  # APIC 0, of one
            elif leaf in (0xB, 0x1F):
                struct.pack_into("=III", found, place + 16, 0, ecx & 0xFF, 0)
        fcntl.ioctl(self.vcpu, SET_CPUID, found)

    def _route(self, vector: int, address: int, data: int) -> None:
        """The table has the lines of the PC's controllers and our messages: it is replaced as a whole."""
        self.messages[vector] = address, data
        entries = [(line, 2, line) for line in range(24)]
        entries += [(line, line // 8, line % 8) for line in range(16)]
        table = [struct.pack("=IIIIII24x", line, ROUTE_PIN, 0, 0, chip, pin) for line, chip, pin in entries]
        for number, (at, value) in self.messages.items():
            message = at & 0xFFFFFFFF, at >> 32, value
            table.append(struct.pack("=IIIIIII20x", 24 + number, ROUTE_MSI, 0, 0, *message))
        fcntl.ioctl(self.vm, SET_ROUTING, bytearray(struct.pack("=II", len(table), 0) + b"".join(table)))

    def boot(self, ram: mmap.mmap, kernel: bytes, initrd: bytes, arguments: str) -> None:
        """Load a Linux and aim the vCPU at it: "The Linux/x86 Boot Protocol", 64-bit."""
        header = kernel[:1024].ljust(1024, b"\0")
        (version,), (flags,) = (
            struct.unpack_from("<H", header, 0x206),
            struct.unpack_from("<H", header, 0x236),
        )
        if header[0x202:0x206] != b"HdrS" or version < 0x20C or not flags & 1:
            raise SystemExit("the kernel is no bzImage that can be entered with 64 bits")
        load, init_size = struct.unpack_from("<QI", kernel, 0x258)
        (initrd_max,) = struct.unpack_from("<I", kernel, 0x22C)
        initrd_at = (min(len(ram), initrd_max + 1) - len(initrd)) & -4096
        if load + init_size > initrd_at:
            raise SystemExit(
                f"kernel and initrd need {(load + init_size + len(initrd) >> 20) + 1} MiB of RAM"
            )
        begin = ((kernel[0x1F1] or 4) + 1) * 512
        ram[load : load + len(kernel) - begin] = kernel[begin:]
        ram[initrd_at : initrd_at + len(initrd)] = initrd
        parameters, tables, line_at = 0x7000, 0x9000, 0x20000
        line = arguments.encode() + b"\0"
        ram[line_at : line_at + len(line)] = line
        page = bytearray(4096)
        end = 0x202 + kernel[0x201]
        page[0x1F1:end] = kernel[0x1F1:end]
        page[0x210] = 0xFF  # a loader without a number
        struct.pack_into("<II", page, 0x218, initrd_at, len(initrd))
        struct.pack_into("<I", page, 0x228, line_at)
        usable = [(0, 0x9FC00), (MIB, len(ram) - MIB)]
        usable += [(region.guest_address, region.size) for region in self.memory.regions[1:]]
        page[0x1E8] = len(usable)
        for number, (at, size) in enumerate(usable):
            struct.pack_into("<QQI", page, 0x2D0 + 20 * number, at, size, 1)
        ram[parameters : parameters + 4096] = bytes(page)
        # Its first page tables: 4 GiB, where they are.
        directories = [tables + 0x2000 + 0x1000 * n for n in range(4)]
        ram[tables : tables + 8] = struct.pack("<Q", tables + 0x1000 | 3)
        ram[tables + 0x1000 : tables + 0x1020] = struct.pack("<4Q", *(at | 3 for at in directories))
        large = struct.pack("<2048Q", *(n << 21 | 0x83 for n in range(2048)))
        ram[tables + 0x2000 : tables + 0x6000] = large
        segments = segment(0x10, 11, is_32=False, is_64=True) + 5 * segment(0x18, 3)
        control = {224: 0x80000011, 240: tables, 248: 0x20, 264: 0x500}  # CR0, CR3, CR4, EFER
        self.set_registers(segments, control, rip=load + 0x200, rsi=parameters)

    def mmio_read(self, address: int, size: int) -> int:
        bar = self.function.bar
        if bar is not None and 0 <= address - bar < self.function.bar_bytes:
            return self.function.bar_read(address - bar, size)
        return super().mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        bar = self.function.bar
        if bar is not None and 0 <= address - bar < self.function.bar_bytes:
            self.function.bar_write(address - bar, size, value)

    def port_read(self, port: int, size: int) -> int:
        if SERIAL <= port < SERIAL + 8:
            return self.uart.read(port - SERIAL)
        if port == PCI_ADDRESS and size == 4:
            return self.address
        if port == CLOCK:
            return 0  # which is no time; all ones would be a clock that is never ready
        if PCI_DATA <= port < PCI_DATA + 4 and self.address >> 31:
            offset = self.address & 0xFC | port & 3
            if self.address & 0xFFFF00 == 0:
                return int.from_bytes(self.bridge[offset : offset + size], "little")
            if self.address & 0xFFFF00 == 0x000800:
                return self.function.config_read(offset, size)
        return super().port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        if SERIAL <= port < SERIAL + 8:
            for character in self.uart.write(port - SERIAL, value & 0xFF):
                self.send(character)
        elif port == PCI_ADDRESS and size == 4:
            self.address = value
        elif PCI_DATA <= port < PCI_DATA + 4 and self.address & 0x80FFFF00 == 0x80000800:
            self.function.config_write(self.address & 0xFC | port & 3, size, value)
            self._move_notifications()

    def _move_notifications(self) -> None:
        """The ioeventfds lie in the BAR, wherever that is now."""
        if self.function.bar == self.notified_at:
            return
        for flags, bar in ((DEASSIGN, self.notified_at), (0, self.function.bar)):
            if bar is not None:
                for index, fd in enumerate(self.function.notify_eventfds):
                    self.ioeventfd(fd, bar + self.function.notify_offset(index), 2, flags)
        self.notified_at = self.function.bar

    def on_shutdown(self) -> str | int:
        return 0  # Linux reboots like this


def run_linux(options: argparse.Namespace, worker: Worker | None) -> int:
    kernel = options.kernel.read_bytes()
    initrd = options.initrd.read_bytes() if options.initrd else b""
    size = options.memory * MIB
    ram = mmap.mmap(-1, min(size, HOLE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = GuestMemory(ram)
    if size > HOLE:
        more = mmap.mmap(-1, size - HOLE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.add(more, guest_address=ABOVE)
    device = Balloon(memory)
    device.set_target(options.target * MIB)
    machine = Pc(memory, device, worker)
    machine.boot(ram, kernel, initrd, f"console=ttyS0 reboot=t panic=-1 {options.append}")
    machine.start()
    shown, has_ended = -1, False
    while not has_ended:
        machine.wait(1.0)
        has_ended = machine.code is not None
        held = memory.resident_bytes()
        if abs(held - shown) >= 8 * MIB or has_ended:
            shown = held
            given = device.counters
            print(
                f"-- the host holds {held / MIB:.1f} MiB; reported {given.reported_bytes / MIB:.1f} MiB,"
                f" in the balloon {device.actual_bytes / MIB:.1f} MiB, {given.system_calls} system calls",
                flush=True,
            )
    code = machine.code
    print("-- the guest has ended" if code == 0 else f"-- the guest has not ended as it should: {code}")
    machine.close()
    return 0 if code == 0 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--exits", action="store_true", help="serve queues within exits, without a worker")
    parser.add_argument("--kernel", type=Path, help="a bzImage: boot Linux")
    parser.add_argument("--initrd", type=Path, help="its initial RAM disk")
    parser.add_argument("--append", default="", help="more arguments for the kernel")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="RAM of a Linux (%(default)s)")
    parser.add_argument(
        "--target", type=int, default=0, metavar="MIB", help="what the balloon is to hold of it"
    )
    options = parser.parse_args()
    if options.memory < 64:
        parser.error("a Linux needs 64 MiB at least")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("/dev/kvm is not there, or not for this user")
        return 1
    worker = None if options.exits else Worker()
    try:
        return run_linux(options, worker) if options.kernel else run_small(worker)
    finally:
        if worker:
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
