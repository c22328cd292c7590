"""Which rings of a front-end run, and where they lie. No I/O.

A ring runs when it has a kick fd, a size, addresses that lie in memory, and is enabled. One that does not
run is not touched: its queue of the device is stopped and its base remembered, so that a ring which runs
again, also on another memory table, is translated anew from its user addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from balloon import spec
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, GuestError, PeerError
from balloon.spec import Role, Status
from balloon.vhost_user.actions import Action, Quiesce, SetKick, SignalErr, Start, Warn
from balloon.vhost_user.messages import MemoryRegion, VringAddress

__all__ = ["Refused", "Ring", "Rings", "Steps"]

DRIVER_OK: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK

Steps: TypeAlias = Generator[Action, str | None, None]
"""Actions one by one; one with a token is answered with why it failed, or None."""


class Refused(Exception):
    """A well-formed request that cannot be carried out."""


@dataclass
class Ring:
    """What the front-end has said of one ring."""

    size: int = 0
    base: int = 0
    address: VringAddress | None = None
    kick: bool = False
    enabled: bool = False
    running: bool = False


class Rings:
    """The rings of one device.

    `new_token` numbers the actions that are waited for, `on_effect` is told what the device asks for.
    """

    def __init__(
        self, device: Balloon, new_token: Callable[[], int], on_effect: Callable[[Effect], None]
    ) -> None:
        self._device = device
        self._new_token = new_token
        self._on_effect = on_effect
        self._owed = Effect.NONE
        self._rings = [Ring() for _ in range(spec.QUEUE_COUNT)]
        self.regions: list[MemoryRegion] = []
        """The memory table in force."""

    def __getitem__(self, index: int) -> Ring:
        """Return a ring.

        :raise PeerError: there is none with this index.
        """
        if index >= len(self._rings):
            raise PeerError(f"ring {index}, there are {len(self._rings)}")
        return self._rings[index]

    @property
    def running(self) -> tuple[int, ...]:
        """Indices of the rings that run."""
        return tuple(index for index, ring in enumerate(self._rings) if ring.running)

    def idle(self, index: int) -> Ring:
        """Return a ring that does not run.

        :raise PeerError: it runs, or there is none with this index.
        """
        ring = self[index]
        if ring.running:
            raise PeerError(f"ring {index} is running")
        return ring

    def start(self, index: int) -> Iterator[Action]:
        """Start a ring if all that it takes is there.

        :raise Refused: it is, but cannot be used.
        """
        ring = self._rings[index]
        if ring.running or not (ring.kick and ring.enabled and ring.size and ring.address):
            return
        role = self._device.role(index)
        if role is None:  # QEMU enables all rings, and a guest may set up one that it has no use for
            yield Warn(f"ring {index} stays stopped: no feature that the driver accepted gives it a role")
            return
        if role is Role.REPORTING and ring.size < spec.REPORTING_CAPACITY:
            raise Refused(
                f"a ring for reporting has at least {spec.REPORTING_CAPACITY} entries, not {ring.size}"
            )
        where = {
            "descriptor_address": self._translate(ring.address.descriptor, spec.DESC_BYTES * ring.size),
            "available_address": self._translate(ring.address.available, 6 + 2 * ring.size),
            "used_address": self._translate(ring.address.used, 6 + 8 * ring.size),
        }
        if not self._device.status & Status.DRIVER_OK:  # no message says it; QEMU sends only FEATURES_OK
            self._on_effect(self._device.write_status(self._device.status | DRIVER_OK))
        try:
            self._device.start_queue(index, size=ring.size, next_available=ring.base, **where)
        except (ConfigError, GuestError) as error:
            raise Refused(f"ring {index} cannot start: {error}") from error
        ring.running = True
        self._on_effect(self._owed)
        self._owed = Effect.NONE
        yield Start(index)

    def stop(self, indices: Iterable[int]) -> Generator[Action, str | None, tuple[int, ...]]:
        """Stop those of the rings that run, once they are quiet; return their indices."""
        running = tuple(index for index in indices if self._rings[index].running)
        if running:
            yield Quiesce(self._new_token(), running)
            for index in running:
                self._stop_queue(index)
        return running

    def stop_all(self, *, enabled: bool) -> Steps:
        """Stop every ring for good: each needs a new kick fd, and is `enabled` or not until told."""
        yield from self.stop(range(len(self._rings)))
        for index, ring in enumerate(self._rings):
            ring.enabled = enabled
            yield from self.forget_kick(index)

    def restart(self, indices: Iterable[int]) -> Iterator[Action]:
        """Start rings again after the memory changed; one that does not fit any more stays stopped."""
        for index in indices:
            try:
                yield from self.start(index)
            except Refused as refused:
                yield Warn(f"ring {index} is stopped after a change of memory: {refused}")
                yield SignalErr(index)

    def forget_kick(self, index: int) -> Iterator[Action]:
        """Let go of a ring's kick fd: it stays stopped until another one comes."""
        if self._rings[index].kick:
            self._rings[index].kick = False
            yield SetKick(index, None)

    def forget_bases(self) -> None:
        """Begin at the first entry again, as after a reset."""
        for ring in self._rings:
            ring.base = 0

    def close(self) -> None:
        """Stop what runs, at once; nothing may be attached any more.

        :raise StateError: a worker owns a queue.
        """
        for index in self.running:
            self._stop_queue(index)

    def _stop_queue(self, index: int) -> None:
        self._rings[index].base = self._device.stop_queue(index)
        self._rings[index].running = False
        # A hinting round that goes on ends with its ring. Told now, QEMU would hear of it after its stop.
        self._owed |= self._device.take_effects()

    def _translate(self, user_address: int, size: int) -> int:
        for region in self.regions:
            offset = user_address - region.user_address
            if offset >= 0 and offset + size <= region.size:
                return region.guest_address + offset
        raise Refused(f"no memory region has {size} bytes at user address {user_address:#x}")
