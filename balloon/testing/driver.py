"""The guest's side of a balloon: rings in guest memory, and a driver that uses them.

It shares no code with the device: numpy structured arrays lay the rings out, and indices and event words go
through ordered stores. It also checks the device: each chain that was posted comes back exactly once, with
length 0, or `DeviceError` says what did not.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from balloon.device import Balloon, Effect
from balloon.errors import BalloonError, ConfigError
from balloon.spec import HINT_STOP, QUEUE_COUNT, Config, Feature, Role, Status
from balloon.testing import _shared
from balloon.testing.ram import GuestRam

__all__ = ["Buffer", "DeviceError", "Driver", "DriverQueue"]

DESCRIPTOR: Final = np.dtype([("address", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("next", "<u2")])
USED: Final = np.dtype([("head", "<u4"), ("length", "<u4")])
STATISTIC: Final = np.dtype([("tag", "<u2"), ("value", "<u8")])
NEXT, WRITE, INDIRECT = 1, 2, 4
PAGE: Final = 4096

Buffer = tuple[int, int, bool]
"""A guest address, a size in bytes, and whether the device may write there."""


class DeviceError(BalloonError, AssertionError):
    """The device did what the standard forbids."""


class DriverQueue:
    """One split virtqueue from the driver's side, at `address` in guest memory.

    The raw parts are there to be damaged by tests: `descriptors`, `available` (flags, index, ring…, used
    event), `used_header`, `used` and `avail_event`.
    """

    def __init__(
        self, ram: GuestRam, size: int, address: int, *, event_idx: bool = True, indirect: bool = True
    ) -> None:
        if size < 1 or size & (size - 1):
            raise ConfigError(f"a queue size of {size} is not a power of two")
        self.ram = ram
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.descriptor_address = address
        self.available_address = address + 16 * size
        self.used_address = -(-(self.available_address + 6 + 2 * size) // 4) * 4
        self.table_address = -(-(self.used_address + 6 + 8 * size) // 16) * 16
        self.end = self.table_address + 16 * size * size
        self.descriptors = ram.array(self.descriptor_address, DESCRIPTOR, size)
        self.available = ram.array(self.available_address, "<u2", size + 3)
        self.used_header = ram.array(self.used_address, "<u2", 2)
        self.used = ram.array(self.used_address + 4, USED, size)
        self.avail_event = ram.array(self.used_address + 4 + 8 * size, "<u2", 1)
        self._available_host = ram.host_address(self.available_address)
        self._used_host = ram.host_address(self.used_address)
        ram.view(address, self.table_address - address)[:] = 0
        self.free = list(range(size))
        self.posted: dict[int, list[int]] = {}
        self.next_available = 0
        self.next_used = 0
        self._kicked_at = 0

    @staticmethod
    def bytes_needed(size: int, *, indirect: bool = True) -> int:
        """Guest memory that a queue of `size` entries takes, its indirect tables included."""
        return 16 * size + 8 + 2 * size + 8 + 8 * size + 16 + (16 * size * size if indirect else 0)

    def post(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Make a chain of buffers available; returns its head.

        :raise ConfigError: the ring has not enough free descriptors.
        """
        return self.post_chain(buffers if not indirect else (), buffers if indirect else ())

    def post_chain(self, direct: Sequence[Buffer], indirect: Sequence[Buffer]) -> int:
        """Make a chain of direct descriptors, then one that refers to a table of indirect ones, available."""
        entries: list[tuple[int, int, int]] = [(a, n, WRITE if w else 0) for a, n, w in direct]
        if not entries and not indirect:
            raise ConfigError("a chain has at least one buffer")
        if len(self.free) < len(entries) + bool(indirect):
            raise ConfigError(f"the ring has {len(self.free)} free descriptors, {len(entries)} are needed")
        if indirect:
            slot = self.free[len(entries)]
            table = self.table_address + 16 * self.size * slot
            rows = self.ram.array(table, DESCRIPTOR, len(indirect))
            for number, (address, length, writable) in enumerate(indirect):
                last = number == len(indirect) - 1
                flags = (WRITE if writable else 0) | (0 if last else NEXT)
                rows[number] = (address, length, flags, 0 if last else number + 1)
            entries.append((table, 16 * len(indirect), INDIRECT))
        heads = [self.free.pop(0) for _ in entries]
        for place, (address, length, flags) in enumerate(entries):
            last = place == len(entries) - 1
            self.descriptors[heads[place]] = (
                address,
                length,
                flags | (0 if last else NEXT),
                0 if last else heads[place + 1],
            )
        self.posted[heads[0]] = heads
        self.make_available(heads[0])
        return heads[0]

    def make_available(self, head: int) -> None:
        """Put any number into the available ring and move its index on."""
        self.available[2 + self.next_available % self.size] = head
        self.next_available = (self.next_available + 1) & 0xFFFF
        _shared.store_release(self._available_host + 2, self.next_available)

    def wants_kick(self) -> bool:
        """Whether the device asked to be notified of what was posted since the last call of this."""
        _shared.fence()
        before, self._kicked_at = self._kicked_at, self.next_available
        if not self.event_idx:
            return not self.used_header[0] & 1
        event = int(self.avail_event[0])
        return (self.next_available - event - 1) & 0xFFFF < (self.next_available - before) & 0xFFFF

    def ask_for_call(self, wanted: bool = True) -> None:
        """Ask for a notification of the next used buffer, or for none."""
        if self.event_idx:
            event = self.next_used if wanted else (self.next_used - 1) & 0xFFFF
            _shared.store_fenced(self._available_host + 4 + 2 * self.size, event)
        else:
            _shared.store_fenced(self._available_host, 0 if wanted else 1)

    def take_used(self) -> list[int]:
        """The heads that came back since the last call.

        :raise DeviceError: a head that was not posted, or that came back twice, or a length that is not 0.
        """
        heads = []
        index = _shared.load_acquire(self._used_host + 2)
        while self.next_used != index:
            head, length = (int(value) for value in self.used[self.next_used % self.size].tolist())
            self.next_used = (self.next_used + 1) & 0xFFFF
            if head not in self.posted:
                raise DeviceError(f"the device used head {head}, which is not posted")
            if length:
                raise DeviceError(f"the device says that it wrote {length} bytes, and it wrote nothing")
            self.free.extend(self.posted.pop(head))
            heads.append(head)
        return heads


class DriverView(Protocol):
    """What a driver needs of a device: a `Balloon` itself, or its registers."""

    @property
    def device_features(self) -> int:
        """The feature bits that are offered."""

    @property
    def status(self) -> int:
        """The device status bits."""

    def set_driver_features(self, features: int) -> None:
        """Accept feature bits."""

    def write_status(self, status: int) -> Effect:
        """Write the device status."""

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the configuration space."""

    def write_config(self, offset: int, data: bytes) -> Effect:
        """Write to the configuration space."""

    def role(self, index: int) -> Role | None:
        """What a queue is for."""

    def start_queue(
        self, index: int, *, size: int, descriptor_address: int, available_address: int, used_address: int
    ) -> None:
        """Set a queue up."""

    def notify(self, index: int) -> Effect:
        """Kick a queue."""


class Driver:
    """A small driver for one balloon device.

    It negotiates, lays its queues out at `ring_address` of guest memory, and inflates, deflates, reports,
    hints and sends statistics. With `stats`, values by their tags, the device has a statistics buffer from
    the start on, as Linux gives it one; without, `post_stats()` is the first. Without `kick` it
    calls `device.notify()` itself; else `kick(index)` has to reach whoever serves the queue, and
    `call_fds[index]`, if there is one, is waited on.
    """

    def __init__(
        self,
        ram: GuestRam,
        device: DriverView,
        *,
        features: int | None = None,
        queue_size: int = 64,
        ring_address: int = 0,
        kick: Callable[[int], None] | None = None,
        timeout: float = 10.0,
        stats: Mapping[int, int] | None = None,
    ) -> None:
        self.ram = ram
        self.device: DriverView = device
        self.features = device.device_features if features is None else features
        self.queue_size = queue_size
        self.timeout = timeout
        self.stats = stats
        self.call_fds: dict[int, int] = {}
        self.effects = Effect.NONE
        self._kick = kick
        self._address = ring_address
        self.queues: dict[Role, DriverQueue] = {}
        self.indices: dict[Role, int] = {}

    def start(self, *, poison: int | None = None) -> None:
        """Reset, negotiate, write `poison_val` if there is one, set the queues up, DRIVER_OK."""
        self.device.write_status(0)
        self.device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.device.set_driver_features(self.features)
        self.device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if self.features & Feature.PAGE_POISON:
            self.device.write_config(Config.POISON_VAL, (poison or 0).to_bytes(4, "little"))
        for index in range(QUEUE_COUNT):
            role = self.device.role(index)
            if role is not None:
                self.start_queue(index, role)
        self.device.write_status(self.device.status | Status.DRIVER_OK)
        if self.stats is not None and Role.STATS in self.queues:
            self.post_stats()

    def lay_out(self, role: Role) -> DriverQueue:
        """Make the driver's side of a queue at the next free place."""
        queue = DriverQueue(
            self.ram,
            self.queue_size,
            self._address,
            event_idx=bool(self.features & Feature.EVENT_IDX),
            indirect=bool(self.features & Feature.INDIRECT_DESC),
        )
        self._address = -(-(queue.end + PAGE) // PAGE) * PAGE  # a page each for the payload
        self.queues[role] = queue
        return queue

    def start_queue(self, index: int, role: Role) -> None:
        """Lay a queue out and hand it to the device."""
        queue = self.lay_out(role)
        self.indices[role] = index
        self.device.start_queue(
            index,
            size=queue.size,
            descriptor_address=queue.descriptor_address,
            available_address=queue.available_address,
            used_address=queue.used_address,
        )

    @property
    def end_of_rings(self) -> int:
        """The first guest address behind everything that this driver uses itself, at a page."""
        return self._address

    def kick(self, role: Role, *, always: bool = False) -> Effect:
        """Notify the device of what was posted, if it asked for that; returns what `notify()` said."""
        effect = Effect.NONE
        if self.queues[role].wants_kick() or always:
            if self._kick is not None:
                self._kick(self.indices[role])
                return effect
            index = self.indices[role]
            effect = self.device.notify(index)
            while effect & (Effect.NOTIFY_AGAIN | Effect.NOTIFY_LATER):
                if effect & Effect.NOTIFY_LATER and isinstance(self.device, Balloon):  # the rate is used up
                    time.sleep(self.device.queue(index).wait_seconds)
                effect &= ~(Effect.NOTIFY_AGAIN | Effect.NOTIFY_LATER)
                effect |= self.device.notify(index)
        self.effects |= effect
        return effect

    def wait(self, role: Role, heads: Iterable[int]) -> None:
        """Wait until the device has used these chains.

        :raise TimeoutError: it has not, within the driver's time-out.
        """
        queue = self.queues[role]
        missing = set(heads)
        until = time.monotonic() + self.timeout
        while missing:
            queue.ask_for_call()
            missing.difference_update(queue.take_used())
            if not missing:
                break
            left = until - time.monotonic()
            if left < 0:
                raise TimeoutError(f"{role.name}: the device has not used {sorted(missing)}")
            self._wait_for_call(self.indices[role], left)

    def _wait_for_call(self, index: int, seconds: float) -> None:
        """Wait for the notification of a queue, or a moment where there is none to wait for."""
        fd = self.call_fds.get(index)
        if fd is None:
            time.sleep(min(seconds, 0.001))
        elif select.select([fd], [], [], seconds)[0]:
            os.read(fd, 8)

    def _pages(self, role: Role, pages: npt.ArrayLike) -> None:
        numbers = np.asarray(pages, dtype="<u4")
        address = self.queues[role].end  # up to 1024 bytes, behind the ring
        for start in range(0, len(numbers), 256):
            part = numbers[start : start + 256]
            self.ram.array(address, "<u4", len(part))[:] = part
            head = self.queues[role].post([(address, 4 * len(part), False)])
            self.kick(role)
            self.wait(role, [head])

    def inflate(self, pages: npt.ArrayLike) -> None:
        """Give pages, by page frame number of 4096 bytes, to the balloon: 256 at a time, as Linux does."""
        self._pages(Role.INFLATE, pages)

    def deflate(self, pages: npt.ArrayLike) -> None:
        """Take pages back from the balloon."""
        self._pages(Role.DEFLATE, pages)

    def report(self, ranges: Iterable[tuple[int, int]], *, indirect: bool | None = None) -> None:
        """Report free ranges, (guest address, size in bytes): 32 in a chain, as Linux does, or fewer.

        A chain of direct descriptors is no longer than the ring.
        """
        queue = self.queues[Role.REPORTING]
        use_table = queue.indirect if indirect is None else indirect
        rows = list(ranges)
        most = min(32, queue.size)
        for start in range(0, len(rows), most):
            chain = [(address, size, True) for address, size in rows[start : start + most]]
            head = queue.post(chain, indirect=use_table)
            self.kick(Role.REPORTING)
            self.wait(Role.REPORTING, [head])

    def post_stats(self, values: Mapping[int, int] | bytes | None = None) -> int:
        """Give the device a statistics buffer: values by their tags, raw bytes, or `stats`; returns its head.

        The device keeps it until it asks for another one.

        :raise ConfigError: more than 4096 bytes.
        """
        if not isinstance(values, bytes):
            pairs = self.stats if values is None else values
            values = np.array(list((pairs or {}).items()), dtype=STATISTIC).tobytes()
        if len(values) > PAGE:
            raise ConfigError(f"{len(values)} bytes of statistics are more than a page")
        queue = self.queues[Role.STATS]
        self.ram.view(queue.end, len(values))[:] = np.frombuffer(values, dtype=np.uint8)
        head = queue.post([(queue.end, len(values), False)])
        self.kick(Role.STATS)
        return head

    def answer_stats(self, values: Mapping[int, int] | bytes | None = None) -> None:
        """Wait until the device uses the statistics buffer, which is how it asks, and post it anew.

        :raise TimeoutError: it does not ask, within the driver's time-out.
        """
        self.wait(Role.STATS, list(self.queues[Role.STATS].posted))
        self.post_stats(values)

    def hint(self, ranges: Iterable[tuple[int, int]], command_id: int | None = None) -> int:
        """Say that ranges, (guest address, size in bytes), are free, as Linux does, and wait for the device.

        The command id, by default the one that the device shows, then a buffer for each range, then STOP.
        Returns the id. The pages are to be kept until the device shows DONE or another id.
        """
        queue = self.queues[Role.HINTING]
        if command_id is None:
            shown = self.device.read_config(Config.FREE_PAGE_HINT_CMD_ID, 4)
            command_id = int.from_bytes(shown, "little")
        self.ram.array(queue.end, "<u4", 2)[:] = command_id, HINT_STOP
        buffers = [(queue.end, 4, False), *((a, n, True) for a, n in ranges), (queue.end + 4, 4, False)]
        for start in range(0, len(buffers), queue.size):
            heads = [queue.post([buffer]) for buffer in buffers[start : start + queue.size]]
            self.kick(Role.HINTING)
            self.wait(Role.HINTING, heads)
        return command_id

    def set_actual(self, pages: int) -> Any:
        """Tell the device how many pages the balloon holds."""
        return self.device.write_config(Config.ACTUAL, pages.to_bytes(4, "little"))
