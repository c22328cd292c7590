"""`VirtioPci`: a virtio-pci function, modern only, for a VMM with a PCI bus.

The VMM routes accesses to the function's configuration space and to its one memory BAR; all of the device's
structures lie in that BAR, and the capability list says where. Any access of any size at any moment is
answered, and what a driver may not do is counted in `refused`.

Sections of the standard: Virtio Over PCI Bus.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from balloon._worker import Worker
from balloon.device import Balloon
from balloon.errors import ConfigError, StateError
from balloon.pci.common import CommonStructure
from balloon.pci.interrupts import Message, PciInterrupts
from balloon.pci.space import COMMAND_BUS_MASTER, COMMAND_MEMORY, MSIX_CAPABILITY, MsixTable, PciSpace
from balloon.snapshot import check_fields, check_list, check_number
from balloon.spec import (
    MSIX_VECTORS_MAX,
    PCI_COMMON_BYTES,
    PCI_DEVICE_ID,
    PCI_REVISION,
    PCI_VENDOR_ID,
    QUEUE_COUNT,
    PciStructure,
)

__all__ = ["VirtioPci"]

COMMON, ISR, DEVICE, NOTIFY, TABLE = 0x0000, 0x0100, 0x0200, 0x1000, 0x2000
"""Where the structures lie in the BAR; kicks and the MSI-X table have pages of their own."""
NOTIFY_MULTIPLIER: Final = 4
VENDOR_CAPABILITY: Final = 0x09
ACCESS_MAX: Final = 8
"""Bytes of the widest access that a VMM passes on."""
SNAPSHOT_VERSION: Final = 1


class VirtioPci(CommonStructure):
    """A balloon as a PCI function: `config_read`, `config_write`, `bar_read` and `bar_write` are its exits.

    Interrupts go to `msix(vector, address, data)`, or to an eventfd for each vector in `vector_fds` (irqfds,
    whose messages `route(vector, address, data)` is told of before one is written); with neither there is no
    MSI-X. `intx(level)` is called where the driver does not enable MSI-X; without it the function has no pin.
    All are called by whoever brings the event (an exit, `poll()`, `apply()`, `on_event()`), outside all
    locks, and by one thread at a time.

    Without a `worker` a kick is served inside its exit, and `poll()` goes on with the rest while `pending` is
    true. With one, `notify_eventfds` are for ioeventfds at `notify_offset()` in the BAR; the VMM calls
    `poll()` when `call_eventfd` is readable, and hands `Worker.take_events()` to `on_event()`.

    The structures lie in BAR `bar`, of `bar_bits` (64 or 32), which has `bar_bytes`. The function is
    conventional and has 256 bytes of configuration space; what lies behind reads as all ones.

    :raise ConfigError: a number of vectors, a BAR, a queue size or ids that cannot be; ways to interrupt that
        do not go together, or none; or something is not what its name says.
    :raise StateError: the worker is closed.
    :raise OSError: one of `vector_fds` is not open, or there are no fds left.
    """

    def __init__(
        self,
        device: Balloon,
        *,
        msix: Message | None = None,
        vector_fds: Sequence[int] | None = None,
        route: Message | None = None,
        intx: Callable[[bool], object] | None = None,
        worker: Worker | None = None,
        vectors: int = QUEUE_COUNT + 1,
        queue_size: int = 256,
        bar: int = 0,
        bar_bits: int = 64,
        subsystem: tuple[int, int] = (PCI_VENDOR_ID, 0x1100),
        timeout: float = 10.0,
    ) -> None:
        if bar_bits not in (32, 64) or not 0 <= bar <= (5 if bar_bits == 32 else 4):
            raise ConfigError(f"BAR {bar} of {bar_bits} bits cannot be")
        if not 1 <= vectors <= MSIX_VECTORS_MAX:
            raise ConfigError(f"{vectors} vectors are not from 1 to {MSIX_VECTORS_MAX}")
        if not all(0 <= number < 1 << 16 for number in subsystem):
            raise ConfigError("a subsystem id has 16 bits")
        has_msix = msix is not None or vector_fds is not None
        self._bar, self._wide = bar, bar_bits == 64
        table = MsixTable(vectors if has_msix else 0)
        self._pba = -(-(TABLE + len(table.table)) // 0x1000) * 0x1000
        self.bar_bytes = 1 << (self._pba + vectors // 8).bit_length()
        space = PciSpace(
            ids=(PCI_VENDOR_ID, PCI_DEVICE_ID),
            revision=PCI_REVISION,
            subsystem=subsystem,
            pin=int(intx is not None),
        )
        space.add_bar(bar, self.bar_bytes, wide=self._wide)
        pin = PciInterrupts(
            space,
            table,
            msix=msix,
            vector_fds=vector_fds,
            route=route,
            intx=intx,
            worker=worker is not None,
        )
        super().__init__(device, pin, worker, queue_size, timeout)
        try:
            self._lay_out(has_msix)
        except BaseException:
            self.close()
            raise

    def _lay_out(self, has_msix: bool) -> None:
        """The capability list: where everything lies (Virtio Structure PCI Capabilities)."""
        if has_msix:
            size = self._table.vectors - 1
            body = struct.pack("<HII", size, TABLE | self._bar, self._pba | self._bar)
            self._msix_place = self._space.add_capability(MSIX_CAPABILITY, body, b"\0\xc0")
        else:
            self._msix_place = 0
        for kind, offset, length, more in (
            (PciStructure.COMMON, COMMON, PCI_COMMON_BYTES, b""),
            (
                PciStructure.NOTIFY,
                NOTIFY,
                NOTIFY_MULTIPLIER * QUEUE_COUNT,
                NOTIFY_MULTIPLIER.to_bytes(4, "little"),
            ),
            (PciStructure.ISR, ISR, 1, b""),
            (PciStructure.DEVICE, DEVICE, self.device.config_bytes, b""),
        ):
            body = struct.pack("<BBBBxxII", 16 + len(more), kind, self._bar, 0, offset, length) + more
            self._space.add_capability(VENDOR_CAPABILITY, body)
        # The window: its BAR, offset, length and data are the driver's to write (E13).
        body = struct.pack("<BBBBxxIII", 20, PciStructure.PCI, 0, 0, 0, 0, 0)
        mask = struct.pack("<BBBBxxIII", 0, 0, 0xFF, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        self._window = self._space.add_capability(VENDOR_CAPABILITY, body, mask)

    # For the VMM.

    @property
    def bar(self) -> int | None:
        """Where the driver, or firmware, has put the BAR; None while memory accesses are not decoded."""
        if not self._space.command & COMMAND_MEMORY:
            return None
        return self._space.bar(self._bar, wide=self._wide)

    def notify_offset(self, index: int) -> int:
        """Where in the BAR queue `index` is kicked, by a write of 2 bytes; for an ioeventfd of any value."""
        return NOTIFY + NOTIFY_MULTIPLIER * index

    def reset(self) -> None:
        """The machine is reset: the device, and what was written to the configuration space."""
        with self._lock:
            self._reset(self.timeout)
            self._space.reset()
            self._table.reset()
            self._masks_changed()
        self._line.deliver()

    # The exits.

    def config_read(self, offset: int, size: int) -> int:
        """An access to the configuration space; all ones where it has ended."""
        if not self._possible(offset, size):
            return (1 << 8 * max(0, min(size, ACCESS_MAX))) - 1
        with self._lock:
            data = self._window + 16
            if offset < data + 4 and data < offset + size:
                window = self._opened()
                if window is not None:
                    self._space.write(data, self._bar_get(*window))
            self._space.show_interrupt(self._pin.shown)
            found = self._space.read(offset, size)
        self._line.deliver()
        return int.from_bytes(found, "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """An access to the configuration space. `bar` may be another one afterwards."""
        if not self._possible(offset, size):
            return
        with self._lock:
            before = self._space.command
            self._space.write(offset, _bytes(value, size))
            data = self._window + 16
            if offset < data + 4 and data < offset + size:
                window = self._opened()
                if window is not None:
                    place, length = window
                    self._bar_set(place, self._space.read(data, length))
            self._read_control()
            if (before ^ self._space.command) & COMMAND_BUS_MASTER:
                self._master_changed()
            self._masks_changed()
            kicked = self._take_kicked()
        self._serve(kicked)

    def bar_read(self, offset: int, size: int) -> int:
        """An access to the BAR, `offset` bytes from its begin; all ones while memory is not decoded."""
        if not self._possible(offset, size) or self.bar is None:
            return (1 << 8 * max(0, min(size, ACCESS_MAX))) - 1
        with self._lock:
            found = self._bar_get(offset, size)
        self._line.deliver()
        return int.from_bytes(found, "little")

    def bar_write(self, offset: int, size: int, value: int) -> None:
        """An access to the BAR; nothing while memory is not decoded."""
        if not self._possible(offset, size) or self.bar is None:
            return
        with self._lock:
            self._bar_set(offset, _bytes(value, size))
            kicked = self._take_kicked()
        self._serve(kicked)

    def _read_control(self) -> None:
        """Take over what the driver has written into the MSI-X capability."""
        if self._msix_place:
            control = self._space.data[self._msix_place + 3]
            self._table.enabled, self._table.function_mask = bool(control & 0x80), bool(control & 0x40)

    def _possible(self, offset: int, size: int) -> bool:
        if offset >= 0 and 0 < size <= ACCESS_MAX:
            return True
        with self._lock:
            self.refused["size"] += 1
        return False

    def _opened(self) -> tuple[int, int] | None:
        """Where in the BAR the window of the configuration access capability is, and its length (E13)."""
        _, bar, offset, length = struct.unpack_from("<BBxxxII", self._space.data, self._window + 3)
        if bar == self._bar and length in (1, 2, 4) and offset % length == 0:
            return offset, length
        if length:  # else nobody has aimed it, and whoever dumps the configuration space reads over it
            self.refused["value"] += 1
        return None

    # The BAR. All of these are called under the lock.

    def _bar_get(self, offset: int, size: int) -> bytes:
        if COMMON <= offset < COMMON + PCI_COMMON_BYTES:
            return self._common_get(offset - COMMON, size)
        if offset == ISR:
            self.refused["size"] += size != 1
            self._pin.listen()  # a worker has told us and not the driver yet
            found = self._pin.status.bits
            self._pin.acknowledge(found)  # no more: the rest has come since
            return found.to_bytes(size, "little")
        if DEVICE <= offset < DEVICE + self.device.config_bytes:
            return self.device.read_config(offset - DEVICE, size)
        if TABLE <= offset < TABLE + len(self._table.table):
            return self._table.read(offset - TABLE, size)
        if self._table.vectors and self._pba <= offset < self._pba + -(-self._table.vectors // 64) * 8:
            self._pin.listen()  # a worker has sent what was masked to us
            return self._table.pending_bits(offset - self._pba, size)
        self.refused["register"] += 1
        return bytes(size)

    def _bar_set(self, offset: int, data: bytes) -> None:
        if COMMON <= offset < COMMON + PCI_COMMON_BYTES:
            self._common_set(offset - COMMON, data)
        elif DEVICE <= offset < DEVICE + self.device.config_bytes:
            self._take(self.device.write_config(offset - DEVICE, data), None)
        elif NOTIFY <= offset < NOTIFY + NOTIFY_MULTIPLIER * self._queue_count:
            # The address alone says which queue, as it does with an ioeventfd.
            index = (offset - NOTIFY) // NOTIFY_MULTIPLIER
            self.refused["size"] += len(data) != 2
            self.refused["value"] += int.from_bytes(data[:2], "little") != index
            if not self._resetting:
                self._kick(index)
        elif TABLE <= offset < TABLE + len(self._table.table):
            if self._table.write(offset - TABLE, data):
                self._masks_changed(((offset - TABLE) // 16,))
            else:
                self.refused["size"] += 1
        else:
            self.refused["register"] += 1

    # Snapshot.

    def snapshot(self) -> dict[str, Any]:
        """The function as plain data: its registers, the pending interrupts, and the device.

        :raise StateError: a drain did not end in time.
        """
        with self._lock:
            inner = super().snapshot()
            self._pin.listen()
            return {
                "version": SNAPSHOT_VERSION,
                "space": self._space.data.hex(),
                "table": self._table.table.hex(),
                "pending": self._table.pending_bits(0, -(-self._table.vectors // 8)).hex(),
                "config_vector": self._pin.config_vector,
                "queue_vectors": list(self._pin.queue_vectors),
                "transport": inner,
            }

    def restore(self, data: object) -> None:
        """Become what `snapshot()` saved: of a function that was made like this one, which is new.

        :raise ConfigError: the data is not a snapshot of such a function.
        :raise StateError: the device is not new, or the worker does not take its queues.

        Whatever is raised, everything is as it was before.
        """
        super().restore(data)

    def _restore(self, data: object) -> Collection[int]:
        saved = check_fields("snapshot", data, SNAPSHOT_FIELDS)
        if check_number("version", saved["version"], 1 << 31) != SNAPSHOT_VERSION:
            raise ConfigError(f"snapshot: its version is not {SNAPSHOT_VERSION}")
        space, table = _from_hex("space", saved["space"]), _from_hex("table", saved["table"])
        bits = int.from_bytes(_from_hex("pending", saved["pending"]), "little")
        pending = {vector for vector in range(bits.bit_length()) if bits >> vector & 1}
        vectors = [
            check_number("a vector", one, 1 << 16)
            for one in [saved["config_vector"], *check_list("queue_vectors", saved["queue_vectors"])]
        ]
        if len(vectors) != QUEUE_COUNT + 1 or any(self._pin.accept(one) != one for one in vectors):
            raise ConfigError("snapshot: a vector cannot be")
        self._space.check(space)
        self._table.check(table, pending)
        with self._lock:
            if self.device.status or self.device.queues:
                raise StateError("only a new device can be restored")
            before = self._state()
            try:
                self._put(space, table, pending, vectors)
                return super()._restore(saved["transport"])
            except BaseException:
                self._put(*before)
                raise

    def _state(self) -> tuple[bytes, bytes, set[int], list[int]]:
        """What `_put()` puts in place: the configuration space, the table, what is pending, the vectors."""
        with self._pin._guard:
            vectors = [self._pin.config_vector, *self._pin.queue_vectors]
            return bytes(self._space.data), bytes(self._table.table), set(self._table.pending), vectors

    def _put(self, space: bytes, table: bytes, pending: set[int], vectors: list[int]) -> None:
        with self._pin._guard:
            self._space.data[:] = space
            self._table.table[:] = table
            self._table.pending = pending
            self._pin.config_vector, *self._pin.queue_vectors = vectors
            self._read_control()
        self._pin.changed()


SNAPSHOT_FIELDS: Final = {
    "version",
    "space",
    "table",
    "pending",
    "config_vector",
    "queue_vectors",
    "transport",
}


def _from_hex(name: str, value: object) -> bytes:
    try:
        if isinstance(value, str) and len(value) <= 2 * 16 * MSIX_VECTORS_MAX:
            return bytes.fromhex(value)
    except ValueError:
        pass
    raise ConfigError(f"snapshot: {name} is not the bytes of it in hexadecimal digits")


def _bytes(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")
