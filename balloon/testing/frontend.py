"""A vhost-user front-end for tests of a back-end: blocking, with a deadline on every wait.

It owns guest memory (a memfd), a kick and a call fd for each ring and the back-end's channel, and sends the
exact sequences of two real front-ends, User-mode Linux and QEMU::

    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        front_end.memory[0:4] = b"data"         # the guest's RAM, from its first byte
        queue = front_end.driver_queue(2)       # reporting, if that is all that was negotiated
        queue.post([(front_end.guest_address + (1 << 22), 1 << 21, True)])
        front_end.kick(2)
        front_end.wait_call(2)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from balloon import spec
from balloon.errors import StateError
from balloon.spec import ROLE_FEATURE, Feature, Role
from balloon.testing.driver import DriverQueue
from balloon.testing.ram import GuestRam
from balloon.testing.wire import (
    ADD_MEM_REG,
    BACKEND_REQ,
    CONFIG,
    CONFIG_CHANGE_MSG,
    F_PROTOCOL_FEATURES,
    GET_CONFIG,
    GET_FEATURES,
    GET_MAX_MEM_SLOTS,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_STATUS,
    GET_VRING_BASE,
    MQ,
    REPLY_ACK,
    SET_BACKEND_REQ_FD,
    SET_CONFIG,
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_PROTOCOL_FEATURES,
    SET_STATUS,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
    SLOTS,
    STATUS,
    VERSION,
    PeerGoneError,
    RefusedError,
    Wire,
)

__all__ = ["FrontEnd", "FrontEndRing", "PeerGoneError", "RefusedError"]

UML_PROTOCOL_FEATURES: Final = REPLY_ACK | BACKEND_REQ | CONFIG
RING_AREA_BYTES: Final = 1 << 16
"""Room for one ring of up to 1024 entries in guest memory."""


class FrontEndRing:
    """One ring: where it lies in guest memory, and its fds."""

    def __init__(self, index: int, size: int, offset: int) -> None:
        self.index = index
        self.size = size
        self.offset = offset
        """Where the ring's area starts in guest memory, from its first byte."""
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = -1
        """What the front-end reads: an eventfd, or one end of a stream socket pair."""
        self.far_call_fd = -1
        """What the back-end writes, while it was not sent or is the same file."""

    @property
    def descriptor_offset(self) -> int:
        """Offset of the descriptor table in guest memory."""
        return self.offset

    @property
    def available_offset(self) -> int:
        """Offset of the available ring in guest memory."""
        return self.offset + 16 * self.size

    @property
    def used_offset(self) -> int:
        """Offset of the used ring in guest memory."""
        return (self.available_offset + 6 + 2 * self.size + 3) & ~3

    def make_call(self, *, stream: bool) -> int:
        """Make a new pair of call fds and return the back-end's."""
        self.close_call()
        if stream:
            near, far = socket.socketpair()
            self.call_fd, self.far_call_fd = near.detach(), far.detach()
        else:
            self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.far_call_fd = os.dup(self.call_fd)
        return self.far_call_fd

    def close_call(self) -> None:
        """Close the call fds."""
        for fd in (self.call_fd, self.far_call_fd):
            if fd >= 0:
                os.close(fd)
        self.call_fd = self.far_call_fd = -1

    def close(self) -> None:
        """Close all fds."""
        self.close_call()
        os.close(self.kick_fd)
        os.close(self.err_fd)


class FrontEnd(Wire):
    """A vhost-user front-end on `sock`, with `memory_bytes` of guest memory.

    Guest memory starts at `guest_address` and is seen by the front-end at `user_address`; in its file it
    starts at `mmap_offset`. User-mode Linux has three equal numbers there, QEMU has a host pointer second.

    Every wait ends after `timeout` seconds with TimeoutError.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        memory_bytes: int = 64 << 20,
        guest_address: int = 0x134E9000,
        user_address: int | None = None,
        mmap_offset: int | None = None,
        ring_size: int = 256,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(sock, timeout=timeout)
        self.memory_bytes = memory_bytes
        self.guest_address = guest_address
        self.user_address = guest_address if user_address is None else user_address
        self.mmap_offset = guest_address if mmap_offset is None else mmap_offset
        self.memory_fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memory_fd, self.mmap_offset + memory_bytes)
        self.memory = mmap.mmap(self.memory_fd, memory_bytes, offset=self.mmap_offset)
        self.rings = [
            FrontEndRing(index, ring_size, index * RING_AREA_BYTES) for index in range(spec.QUEUE_COUNT)
        ]
        self.features = 0
        self.protocol_features = 0
        self.channel: socket.socket | None = None
        self.far_channel: socket.socket | None = None
        self._region_sent = False
        self._queues: dict[int, DriverQueue] = {}

    @classmethod
    def connect(cls, path: str | Path, *, timeout: float = 10.0, **options: Any) -> Self:
        """Connect to the back-end that listens at `path`; `options` are those of the class.

        :raise OSError: nobody listens there.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up and free everything; a second call does nothing."""
        self.socket.close()
        if self.memory_fd < 0:
            return
        for channel in (self.channel, self.far_channel):
            if channel is not None:
                channel.close()
        for ring in self.rings:
            ring.close()
        self._queues.clear()
        with contextlib.suppress(BufferError):  # a numpy view of it is left: it goes when that goes
            self.memory.close()
        os.close(self.memory_fd)
        self.memory_fd = -1

    # Payloads.

    def region(self, *, offset: int = 0, size: int | None = None) -> bytes:
        """Return the description of guest memory, or of a part of it."""
        return struct.pack(
            "=QQQQ",
            self.guest_address + offset,
            self.memory_bytes - offset if size is None else size,
            self.user_address + offset,
            self.mmap_offset + offset,
        )

    def memory_table(self, *, padded: bool = False) -> bytes:
        """Return a table of one region; `padded` to two, as User-mode Linux sends it."""
        return struct.pack("=II", 1, 0) + self.region() + (bytes(32) if padded else b"")

    def ring_address(self, ring: FrontEndRing, *, log: int = 0) -> bytes:
        """Return the payload of SET_VRING_ADDR."""
        return struct.pack(
            "=IIQQQQ",
            ring.index,
            0,
            self.user_address + ring.descriptor_offset,
            self.user_address + ring.used_offset,
            self.user_address + ring.available_offset,
            log,
        )

    @staticmethod
    def state(index: int, number: int) -> bytes:
        """Return a vring state."""
        return struct.pack("=II", index, number)

    def ring_roles(self) -> list[Role]:
        """Return what each ring is for: their numbers are dense over what was acknowledged."""
        return [role for role in Role if (need := ROLE_FEATURE[role]) is None or self.features & need]

    def ring_count(self) -> int:
        """Return how many rings the driver has."""
        return len(self.ring_roles())

    def index_of(self, role: Role) -> int:
        """Return the number of the ring with this role.

        :raise ValueError: there is none.
        """
        return self.ring_roles().index(role)

    def clear_rings(self) -> None:
        """Make all rings empty, as a new driver finds them."""
        self._queues.clear()
        self.memory[0 : len(self.rings) * RING_AREA_BYTES] = bytes(len(self.rings) * RING_AREA_BYTES)

    # User-mode Linux 6.1 and 6.12.

    def boot_like_uml(self) -> None:
        """Send what User-mode Linux sends when it boots."""
        self.send(SET_OWNER)
        self.features = self.ask_u64(GET_FEATURES)
        offered = self.ask_u64(GET_PROTOCOL_FEATURES)
        self.protocol_features = offered & UML_PROTOCOL_FEATURES
        self.demand(SET_PROTOCOL_FEATURES, struct.pack("=Q", self.protocol_features))
        self._make_channel()
        assert self.far_channel is not None
        self.demand(SET_BACKEND_REQ_FD, fds=[self.far_channel.fileno()])
        self.far_channel.close()

    def insmod_like_uml(self, *, drop: int = 0) -> None:
        """Send what User-mode Linux sends when its balloon driver is loaded.

        `drop` are the features that the driver's validate() clears: if there are any, SET_FEATURES comes a
        second time, without bit 30, and SET_VRING_ENABLE does not come, then and in all later lives.
        """
        self.demand(SET_FEATURES, struct.pack("=Q", self.features))
        if self.features & drop:
            self.features &= ~(drop | F_PROTOCOL_FEATURES)
            self.demand(SET_FEATURES, struct.pack("=Q", self.features))
        self.clear_rings()
        self.demand(SET_MEM_TABLE, self.memory_table(padded=True), [self.memory_fd])
        rings = self.rings[: self.ring_count()]
        for ring in rings:
            self.demand(SET_VRING_CALL, struct.pack("=Q", ring.index), [ring.make_call(stream=True)])
            os.close(ring.far_call_fd)
            ring.far_call_fd = -1
            self.demand(SET_VRING_NUM, self.state(ring.index, ring.size))
            self.demand(SET_VRING_BASE, self.state(ring.index, 0))
            self.demand(SET_VRING_ADDR, self.ring_address(ring, log=(1 << 64) - 1))
        for ring in rings:
            os.close(ring.kick_fd)
            ring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC)
            self.demand(SET_VRING_KICK, struct.pack("=Q", ring.index), [ring.kick_fd])
            if self.features & F_PROTOCOL_FEATURES:
                self.demand(SET_VRING_ENABLE, self.state(ring.index, 1))
        self.read_config_like_uml(0)

    def rmmod_like_uml(self) -> None:
        """Send what User-mode Linux sends when its balloon driver is unloaded."""
        self.write_config_like_uml(spec.Config.ACTUAL, 0)
        if self.features & F_PROTOCOL_FEATURES:
            for ring in reversed(self.rings[: self.ring_count()]):
                self.demand(SET_VRING_ENABLE, self.state(ring.index, 0))
        self.ask_u64(GET_FEATURES)

    def start_like_uml(self, *, drop: int = 0) -> None:
        """Send all that User-mode Linux sends until its driver is up."""
        self.boot_like_uml()
        self.insmod_like_uml(drop=drop)

    def read_config_like_uml(self, offset: int) -> int:
        """Read one field of the configuration space: everything up to its end is asked for."""
        size = offset + 4
        answer = self.ask(GET_CONFIG, struct.pack("=III", 0, size, 0) + bytes(size))
        if len(answer) != 12 + size or struct.unpack_from("=III", answer) != (0, size, 0):
            raise RefusedError(f"an answer of {len(answer)} bytes for a config window of {size}")
        return int(struct.unpack_from("<I", answer, 12 + offset)[0])

    def write_config_like_uml(self, offset: int, value: int) -> None:
        """Write one field of the configuration space."""
        self.demand(SET_CONFIG, struct.pack("=III", offset, 4, 0) + struct.pack("<I", value))

    # QEMU 11.1, vhost-user-test-device-pci.

    def boot_like_qemu(self, *, protocol_features: int = (1 << 64) - 1) -> None:
        """Send what QEMU sends when it is started; it takes every protocol feature that is offered."""
        offered = self.ask_u64(GET_FEATURES)
        self.protocol_features = self.ask_u64(GET_PROTOCOL_FEATURES) & protocol_features
        self.send(SET_PROTOCOL_FEATURES, struct.pack("=Q", self.protocol_features))
        if self.protocol_features & MQ:
            self.ask_u64(GET_QUEUE_NUM)
        if self.protocol_features & SLOTS:
            self.ask_u64(GET_MAX_MEM_SLOTS)
        if self.protocol_features & BACKEND_REQ:
            self._make_channel()
            assert self.far_channel is not None
            self.demand(SET_BACKEND_REQ_FD, fds=[self.far_channel.fileno()])
            self.far_channel.close()
        self.send(SET_OWNER)
        self.features = self.ask_u64(GET_FEATURES) & offered
        for ring in self.rings:
            self.demand(SET_VRING_CALL, struct.pack("=Q", ring.index), [ring.make_call(stream=False)])
            self.demand(SET_VRING_ERR, struct.pack("=Q", ring.index), [ring.err_fd])

    def insmod_like_qemu(self, *, drop: int = 0) -> None:
        """Send what QEMU sends when the guest's driver sets DRIVER_OK, without the features in `drop`."""
        features = self.features & ~drop
        self.send(SET_FEATURES, struct.pack("=Q", features))
        if self.protocol_features & STATUS and not self.ask_u64(GET_STATUS) & spec.Status.FEATURES_OK:
            self.send(SET_STATUS, struct.pack("=Q", spec.Status.FEATURES_OK))
        self.clear_rings()
        if not self.protocol_features & SLOTS:
            self.demand(SET_MEM_TABLE, self.memory_table(), [self.memory_fd])
        elif not self._region_sent:  # QEMU keeps account and sends what has changed, also over a stop
            self.demand(ADD_MEM_REG, bytes(8) + self.region(), [self.memory_fd])
            self._region_sent = True
        self.features = features
        for ring in self.rings[: self.ring_count()]:
            self.send(SET_VRING_NUM, self.state(ring.index, ring.size))
            self.send(SET_VRING_BASE, self.state(ring.index, 0))
            self.send(SET_VRING_ADDR, self.ring_address(ring))
            self.demand(SET_VRING_KICK, struct.pack("=Q", ring.index), [ring.kick_fd])
            self.demand(SET_VRING_CALL, struct.pack("=Q", ring.index), [ring.far_call_fd])
        for ring in self.rings:
            self.send(SET_VRING_ENABLE, self.state(ring.index, 1))
        for ring in self.rings:
            self.demand(SET_VRING_CALL, struct.pack("=Q", ring.index), [ring.far_call_fd])

    def stop_like_qemu(self) -> list[int]:
        """Send what QEMU sends when the guest resets the device; return the bases of the rings."""
        for ring in self.rings:
            self.send(SET_VRING_ENABLE, self.state(ring.index, 0))
        bases = []
        for ring in self.rings[: self.ring_count()]:
            index, base = struct.unpack("=II", self.ask(GET_VRING_BASE, self.state(ring.index, 0)))
            if index != ring.index:
                raise RefusedError(f"the base of ring {index}, wanted that of {ring.index}")
            bases.append(base)
        return bases

    def start_like_qemu(self, *, drop: int = 0, protocol_features: int = (1 << 64) - 1) -> None:
        """Send all that QEMU sends until the guest's driver is up."""
        self.boot_like_qemu(protocol_features=protocol_features)
        self.insmod_like_qemu(drop=drop)

    def read_config_like_qemu(self, size: int = 16) -> bytes:
        """Read the whole configuration space."""
        answer = self.ask(GET_CONFIG, struct.pack("=III", 0, size, 0) + bytes(size))
        if len(answer) != 12 + size:
            raise RefusedError(f"an answer of {len(answer)} bytes for a config window of {size}")
        return answer[12:]

    def write_config_like_qemu(self, config: bytes) -> None:
        """Write the whole configuration space, with whatever QEMU's copy has in the other fields."""
        self.demand(SET_CONFIG, struct.pack("=III", 0, len(config), 0) + config)

    # The driver's side of the rings.

    def guest_ram(self) -> GuestRam:
        """Return guest memory as numpy arrays by guest address."""
        return GuestRam([(self.guest_address, np.frombuffer(self.memory, dtype=np.uint8))])

    def driver_queue(self, index: int) -> DriverQueue:
        """Return the driver's side of a ring; its chains are direct. A new driver has new ones."""
        if index not in self._queues:
            ring = self.rings[index]
            address = self.guest_address + ring.offset
            event_idx = bool(self.features & Feature.EVENT_IDX)
            queue = DriverQueue(self.guest_ram(), ring.size, address, event_idx=event_idx, indirect=False)
            self._queues[index] = queue
        return self._queues[index]

    # Events.

    def kick(self, index: int) -> None:
        """Tell the back-end that a ring has something available."""
        os.eventfd_write(self.rings[index].kick_fd, 1)

    def wait_call(self, index: int, timeout: float | None = None) -> None:
        """Wait for a used buffer notification of a ring.

        :raise TimeoutError: none came; :raise RefusedError: it was not 8 bytes.
        """
        fd = self.rings[index].call_fd
        self._wait_readable(fd, timeout, f"no notification of ring {index}")
        data = os.read(fd, 8)
        if len(data) != 8:
            raise RefusedError(f"a notification of {len(data)} bytes, a guest warns unless it has 8")

    def wait_err(self, index: int, timeout: float | None = None) -> None:
        """Wait until the back-end says that a ring is broken.

        :raise TimeoutError: it did not.
        """
        self._wait_readable(self.rings[index].err_fd, timeout, f"no error of ring {index}")
        os.read(self.rings[index].err_fd, 8)

    def wait_config_change(self, timeout: float | None = None) -> None:
        """Wait for CONFIG_CHANGE_MSG on the back-end's channel.

        :raise TimeoutError: none came; :raise RefusedError: something else did, or it wants an answer.
        :raise StateError: there is no channel.
        """
        if self.channel is None:
            raise StateError("the back-end has no channel yet")
        self._wait_readable(self.channel.fileno(), timeout, "no config change")
        message = struct.unpack("=III", self.channel.recv(12, socket.MSG_WAITALL))
        if message != (CONFIG_CHANGE_MSG, VERSION, 0):
            raise RefusedError(f"{message} on the back-end's channel")

    def has_config_change(self, within: float = 0.05) -> bool:
        """Wait shortly for a config change and say whether one came."""
        with contextlib.suppress(TimeoutError):
            self.wait_config_change(within)
            return True
        return False

    def _make_channel(self) -> None:
        for channel in (self.channel, self.far_channel):
            if channel is not None:
                channel.close()
        self.channel, self.far_channel = socket.socketpair()
        self.channel.settimeout(self.timeout)

    def _wait_readable(self, fd: int, timeout: float | None, late: str) -> None:
        seconds = self.timeout if timeout is None else timeout
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            if time.monotonic() >= until:
                raise TimeoutError(f"{late} within {seconds:g} s")
