"""Which rings of a front-end run, and where they lie. No I/O.

A ring runs when it has a size, addresses that lie in memory and a kick fd, and is enabled. One that does not
run is not touched: its queue of the device is stopped. A ring is

* disabled, and goes on as it is set up when it is enabled;
* without memory: it goes on as soon as the memory that it lies in is back;
* at rest: its driver may have left and the front-end could not say so. It goes on at a sign of life;
* stopped for good, by GET_VRING_BASE, a reset or the features of another driver: it needs a new set-up, in
  full, in whatever order that comes.

A size and addresses belong together: where one of them changes, the ring does not run before both have come.
The base may come late or never; then the ring goes on where its used index stands.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from balloon import spec
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, GuestError, PeerError
from balloon.spec import Status
from balloon.vhost_user.actions import Action, Quiesce, Rest, SetKick, SignalErr, Start, Warn
from balloon.vhost_user.messages import MemoryRegion, Request, VringAddress

__all__ = ["Refused", "Ring", "Rings", "Steps"]

DRIVER_OK: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
PLACE: Final = frozenset({Request.SET_VRING_NUM, Request.SET_VRING_ADDR})
"""What belongs together."""

Steps: TypeAlias = Generator[Action, str | None, None]
"""Actions one by one; one with a token is answered with why it failed, or None."""


class Refused(Exception):
    """A well-formed request that cannot be carried out."""


@dataclass
class Ring:
    """What the front-end has said of one ring."""

    size: int = 0
    base: int = 0
    base_known: bool = False
    address: VringAddress | None = None
    kick: bool = False
    enabled: bool = False
    running: bool = False
    resting: bool = False
    """It was stopped until there is a sign of life of its driver."""
    homeless: bool = False
    """It ran, and its memory went away."""
    told: set[Request] = field(default_factory=set)
    """Which of NUM, BASE and ADDR came since the ring was disabled or stopped."""
    moved: bool = False
    """One of NUM and ADDR was another one than before."""
    used: bool = False
    """It ran, since it was last stopped for good."""
    asked_base: int | None = None
    """What GET_VRING_BASE was last answered with."""

    @property
    def complete(self) -> bool:
        """Whether the ring can run: everything is there, and of one set-up."""
        placed = bool(self.size and self.address) and (not self.moved or self.told >= PLACE)
        return placed and self.kick and self.enabled

    def begin(self) -> None:
        """What comes from now on is another set-up."""
        self.told.clear()
        self.moved = False


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

    @property
    def resting(self) -> tuple[int, ...]:
        """Indices of the rings that wait for a sign of life of their driver."""
        return tuple(index for index, ring in enumerate(self._rings) if ring.resting)

    @property
    def abandoned(self) -> bool:
        """Whether a ring ran whose base was not asked for: nobody can go on with it."""
        return any(ring.used for ring in self._rings)

    def change(self, index: int, what: Request, *, moves: bool) -> Steps:
        """Have a ring told its size, base or addresses; it does not run any more if it `moves` with that.

        What was not told of this set-up may come after the ring has started: it is stopped for it.

        :raise PeerError: it runs as it was told, or there is none with this index.
        """
        ring = self[index]
        if ring.running and what in ring.told:
            raise PeerError(f"ring {index} is running")
        if ring.resting or ring.homeless:
            ring.begin()
        if moves or not ring.running:
            yield from self.stop((index,))
        ring.told.add(what)
        ring.moved = ring.moved or (moves and what in PLACE)

    def start(self, index: int) -> Iterator[Action]:
        """Start a ring if all that it takes is there.

        :raise Refused: it is, but cannot be used.
        """
        ring = self._rings[index]
        if ring.running or not ring.complete:
            return
        assert ring.address is not None
        if self._device.role(index) is None:  # QEMU enables all, and a guest may set up one it has no use for
            yield Warn(f"ring {index} stays stopped: no feature that the driver accepted gives it a role")
            return
        try:
            where = {
                "descriptor_address": self._translate(ring.address.descriptor, spec.DESC_BYTES * ring.size),
                "available_address": self._translate(ring.address.available, 6 + 2 * ring.size),
                "used_address": self._translate(ring.address.used, 6 + 8 * ring.size),
            }
        except Refused:
            ring.homeless = ring.used and not ring.resting
            raise
        if not self._device.status & Status.DRIVER_OK:  # no message says it; QEMU sends only FEATURES_OK
            self._on_effect(self._device.write_status(self._device.status | DRIVER_OK))
        try:
            self._device.start_queue(
                index,
                size=ring.size,
                next_available=ring.base,
                resume=True,
                anywhere=not ring.base_known,
                **where,
            )
        except (ConfigError, GuestError) as error:
            raise Refused(f"ring {index} cannot start: {error}") from error
        ring.running = ring.used = True
        ring.resting = ring.homeless = False
        ring.asked_base = None
        self._pay()
        yield Start(index)

    def stop(self, indices: Iterable[int]) -> Generator[Action, str | None, tuple[int, ...]]:
        """Stop those of the rings that run, once they are quiet; return their indices.

        None of them starts again by itself.
        """
        indices = tuple(indices)
        running = tuple(index for index in indices if self._rings[index].running)
        if running:
            yield Quiesce(self._new_token(), running)
            for index in running:
                self._stop_queue(index)
        for index in indices:
            self._rings[index].resting = self._rings[index].homeless = False
        return running

    def rest(self) -> Steps:
        """Stop all rings that run, until there is a sign of life of their driver."""
        running = self.running
        if running:
            yield Rest(self._new_token(), running)
        for index in running:
            self._stop_queue(index)
            self._rings[index].resting = True
        for ring in self._rings:
            ring.resting, ring.homeless = ring.resting or ring.homeless, False
        self._pay()

    def revive(self, indices: Iterable[int]) -> Iterator[Action]:
        """Start those of the rings that rest: their driver is there."""
        yield from self._again([index for index in indices if self._rings[index].resting])

    def disable(self, index: int) -> Steps:
        """Stop a ring until it is enabled again, as it is set up or after a new set-up."""
        ring = self[index]
        ring.enabled = False
        yield from self.stop((index,))
        ring.begin()

    def forget(self, index: int) -> Steps:
        """Stop a ring for good: only a new set-up starts it."""
        ring = self[index]
        yield from self.stop((index,))
        ring.size, ring.address, ring.base_known, ring.used = 0, None, False, False
        ring.begin()
        if ring.kick:
            ring.kick = False
            yield SetKick(index, None)

    def ask_base(self, index: int) -> Generator[Action, str | None, int]:
        """Stop a ring for good, and return where somebody else may go on."""
        yield from self.forget(index)
        ring = self._rings[index]
        ring.asked_base = ring.base
        return ring.base

    def forget_all(self, *, enabled: bool, unused: bool) -> Steps:
        """Stop every ring for good, those that never ran only with `unused`; it is `enabled` until told."""
        yield from self.stop(range(len(self._rings)))
        for index, ring in enumerate(self._rings):
            ring.enabled = enabled
            if unused or ring.used:
                yield from self.forget(index)

    def forget_bases(self) -> None:
        """Begin at the first entry again, as after a reset."""
        for ring in self._rings:
            ring.base = 0
            ring.asked_base = None

    def restart(self, indices: Iterable[int]) -> Iterator[Action]:
        """Start rings again after the memory changed, and those whose memory is back."""
        homeless = [index for index, ring in enumerate(self._rings) if ring.homeless]
        yield from self._again(sorted({*indices, *homeless}))

    def close(self) -> None:
        """Stop what runs, at once; nothing may be attached any more.

        :raise StateError: a worker owns a queue.
        """
        for index in self.running:
            self._stop_queue(index)
        self._on_effect = _ignore  # so that nothing here refers to its owner

    def _again(self, indices: Iterable[int]) -> Iterator[Action]:
        """Start rings that ran before; one whose memory is gone goes on as it was, or waits for that."""
        for index in indices:
            ring = self._rings[index]
            waits = ring.resting or ring.homeless
            try:
                yield from self.start(index)
            except Refused as refused:
                if not waits:
                    yield Warn(f"ring {index} is stopped until its memory is back: {refused}")
                    yield SignalErr(index)

    def _stop_queue(self, index: int) -> None:
        ring = self._rings[index]
        ring.base = self._device.stop_queue(index)
        ring.base_known = True
        ring.running = False
        # A hinting round that goes on ends with its ring. Told now, QEMU would hear of it after its stop.
        self._owed |= self._device.take_effects()

    def _pay(self) -> None:
        self._on_effect(self._owed)
        self._owed = Effect.NONE

    def _translate(self, user_address: int, size: int) -> int:
        for region in self.regions:
            offset = user_address - region.user_address
            if offset >= 0 and offset + size <= region.size:
                return region.guest_address + offset
        raise Refused(f"no memory region has {size} bytes at user address {user_address:#x}")


def _ignore(effect: Effect) -> None:
    """Do nothing about an effect."""
