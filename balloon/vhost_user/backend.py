"""The back-end's state machine: messages in, actions out. It holds no fd, no clock and no thread.

The rules that it keeps:

* Messages of one connection are taken strictly in order: while a token is out, `receive` refuses.
* What stops, disables, resets or remaps is answered after the rings concerned are quiet (CONTRACTS 3). All
  other requests are answered at once: a User-mode Linux guest stands still until we answer.
* `F_PROTOCOL_FEATURES` in the last SET_FEATURES says whether rings wait for SET_VRING_ENABLE. User-mode Linux
  drops it when its driver's validate() clears a feature, and then neither enables nor disables rings. Its
  driver's farewell is then all that says that the rings' memory may be gone: from that on they rest, until
  there is a sign of life, or SET_FEATURES begins a new set-up.
* What the protocol forbids raises `PeerError`. What is well formed but cannot be done is answered with 1 if
  the front-end asked for an answer, and raises `PeerError` if it did not: it must not go on in the belief
  that all is well.
* CONFIG_CHANGE_MSG is sent only while a ring runs: QEMU's generic device has no virtio device before its
  start and after its stop, and would follow a null pointer. What changed before is told at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from balloon import spec
from balloon.device import Balloon, Effect
from balloon.errors import GuestError, PeerError, StateError
from balloon.memory import FdRegion
from balloon.spec import PAGE_SHIFT, Config, Status
from balloon.vhost_user import messages as wire
from balloon.vhost_user.actions import (
    Action,
    MapRegion,
    MapTable,
    NotifyConfig,
    Reply,
    SetCall,
    SetChannel,
    SetErr,
    SetKick,
    SignalErr,
    UnmapRegion,
    Waiting,
    Warn,
)
from balloon.vhost_user.messages import MemoryRegion, Message, ProtocolFeature, Request
from balloon.vhost_user.rings import Refused, Rings, Steps

__all__ = ["PROTOCOL_FEATURES", "Backend"]

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.STATUS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
"""What is offered. Never INBAND_NOTIFICATIONS: a guest that reads a call and a config change in one go loses
the config change (User-mode Linux, vu_req_interrupt)."""

ALL: Final = range(spec.QUEUE_COUNT)


class Backend:
    """One front-end's view of one device.

    `device` is started and stopped by what `receive` is told; its queues are attached to a worker by whoever
    carries out `Start` and `Quiesce`.
    """

    def __init__(self, device: Balloon) -> None:
        self._device = device
        self._tokens = itertools.count(1)
        self._rings = Rings(device, self._tokens.__next__, self._on_effect)
        self._features = 0
        self._protocol = ProtocolFeature(0)
        self._channel = False
        self._config_changed = False
        self._task: Steps | None = None
        self._token = 0
        self._alive = False
        self._stale_actual = (0, 0)

    @property
    def busy(self) -> bool:
        """Whether a token is out, and the next message has to wait."""
        return self._task is not None

    @property
    def running(self) -> tuple[int, ...]:
        """Indices of the rings that are attached, or will be once the last actions were carried out."""
        return self._rings.running

    @property
    def resting(self) -> bool:
        """Whether rings are left alone because their driver may be gone: see `alive` and `ask_for_life`."""
        return bool(self._rings.resting)

    @property
    def config_deliverable(self) -> bool:
        """Whether the front-end can be told of a config change: without that, a new target is not seen."""
        needed = ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
        return self._channel and self._protocol & needed == needed

    def receive(self, message: Message, fds: Sequence[int] = ()) -> list[Action]:
        """Take one message with the fds that came with it; return what has to be done.

        An fd passes to the edge with the action that names it. The edge closes all others when the message
        is done with, which is when `busy` is false again.

        :raise PeerError: the front-end broke the protocol; close the connection. `refusal` says whether an
            answer is due before.
        :raise StateError: a token is out.
        """
        if self._task is not None:
            raise StateError("the message before this one is not done with: resume its token first")
        self._task = self._serve(message, tuple(fds))
        return self._advance(None)

    def resume(self, token: int, error: str | None = None) -> list[Action]:
        """Go on after an action with a token was carried out; `error` says why it could not be.

        :raise PeerError: as for `receive`.
        :raise StateError: this token is not out.
        """
        if self._task is None or token != self._token:
            raise StateError(f"token {token} is not out")
        return self._advance(error)

    def refusal(self, message: Message) -> bytes:
        """Return the last answer before the connection ends because of `message`; empty if none is due.

        The protocol asks for an answer to every request with need_reply, also to one that failed.
        """
        return wire.reply_u64(message.request, 1) if self._wants_ack(message) else b""

    def apply(self, effect: Effect) -> list[Action]:
        """Return what has to be done about an effect that the device gave to somebody else."""
        self._on_effect(effect)
        if self._config_changed and self.resting:  # a driver may be there; told again when rings run
            return self.ask_for_life()
        return self._tell_config()

    def ask_for_life(self) -> list[Action]:
        """Return what makes a driver that is there read the configuration space, if rings rest."""
        return [NotifyConfig()] if self.resting and self.config_deliverable else []

    def alive(self) -> list[Action]:
        """Take a kick of a ring that rests: its driver is there. A message under way is finished before."""
        self._alive = True
        return self._settle() if self._task is None else []

    def fault(self, index: int) -> list[Action]:
        """Take the news that a ring is corrupt: its worker has parked it, and does not touch it again."""
        if index not in self.running:
            return []
        queue = self._device.queue(index)
        effect = self._device.fault(queue)
        why, section = spec.FAULT_TEXT.get(queue.fault, (queue.fault.name, "Virtqueues"))
        text = f"ring {index} is stopped, the device needs a reset: {why} ({section})"
        return [Warn(text), SignalErr(index), *self.apply(effect)]

    def close(self) -> None:
        """Stop the device's queues after the connection ended; nothing may be attached. Callable twice.

        :raise StateError: a worker still owns a queue.
        """
        self._task = None
        self._rings.close()

    # The engine.

    def _advance(self, result: str | None) -> list[Action]:
        assert self._task is not None
        actions: list[Action] = []
        try:
            action = self._task.send(result)
            while not isinstance(action, Waiting):
                actions.append(action)
                action = next(self._task)
            self._token = action.token
            return [*actions, action]
        except StopIteration:
            self._task = None
        except BaseException:
            self._task = None
            raise
        return [*actions, *self._settle()]

    def _settle(self) -> list[Action]:
        """What is left to do when no message is under way."""
        revived: list[Action] = []
        if self._alive:
            self._alive = False
            revived = list(self._rings.revive(ALL))
        return [*revived, *self._tell_config()]

    def _serve(self, message: Message, fds: tuple[int, ...]) -> Steps:
        rule = RULES.get(message.request)
        if rule is None:
            raise PeerError(f"{message.name} was not offered, or is unknown")
        if rule.needs & ~self._protocol:
            raise PeerError(f"{message.name} without protocol feature {rule.needs.name} negotiated")
        if rule.payload_bytes is not None and len(message.payload) != rule.payload_bytes:
            raise PeerError(
                f"{message.name}: payload of {len(message.payload)} bytes, not {rule.payload_bytes}"
            )
        if rule.fds is not None and len(fds) != rule.fds:
            raise PeerError(f"{message.name}: {len(fds)} fds, not {rule.fds}")
        try:
            yield from rule.handler(self, message.payload, fds)
        except Refused as refused:
            if not self._wants_ack(message):
                raise PeerError(f"{message.name}: {refused}") from refused
            yield Warn(f"{message.name} refused: {refused}")
            yield Reply(wire.reply_u64(message.request, 1))
            return
        except PeerError as error:
            raise PeerError(f"{message.name}: {error}") from error
        # Only now: REPLY_ACK holds for the very SET_PROTOCOL_FEATURES that brings it.
        if self._wants_ack(message):
            yield Reply(wire.reply_u64(message.request, 0))

    def _wants_ack(self, message: Message) -> bool:
        rule = RULES.get(message.request)
        acknowledges = bool(self._protocol & ProtocolFeature.REPLY_ACK) and message.need_reply
        return acknowledges and not (rule is not None and rule.answers)

    def _on_effect(self, effect: Effect) -> None:
        if effect & Effect.NOTIFY_CONFIG:
            self._config_changed = True

    def _tell_config(self) -> list[Action]:
        if not (self._config_changed and self.config_deliverable and self.running):
            return []
        self._config_changed = False
        return [NotifyConfig()]

    # Features, status, owner.

    @property
    def _starts_enabled(self) -> bool:
        return not self._features & wire.F_PROTOCOL_FEATURES

    def _get_features(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        if self._starts_enabled:  # User-mode Linux asks once more before it frees its rings
            yield from self._rest()
        features = self._device.device_features | wire.F_PROTOCOL_FEATURES
        yield Reply(wire.reply_u64(Request.GET_FEATURES, features))

    def _set_features(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        features = wire.parse_u64(payload)
        if self.running and not self._starts_enabled:
            if features != self._features:
                raise PeerError("other features while rings are enabled and running")
            return
        self._features = features
        abandoned = self._rings.abandoned
        yield from self._rings.forget_all(enabled=self._starts_enabled, unused=False)
        # A driver that begins anew has reset the device, whether or not there is a message for it.
        if abandoned or self._device.status & Status.NEEDS_RESET:
            self._reset_device()
        try:
            self._device.set_driver_features(features & ~wire.F_PROTOCOL_FEATURES)
        except GuestError as error:
            raise PeerError(str(error)) from error

    def _get_protocol_features(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        yield Reply(wire.reply_u64(Request.GET_PROTOCOL_FEATURES, PROTOCOL_FEATURES))

    def _set_protocol_features(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        features = wire.parse_u64(payload)
        if features & ~PROTOCOL_FEATURES:
            raise PeerError(f"protocol features {features & ~PROTOCOL_FEATURES:#x} were not offered")
        self._protocol = ProtocolFeature(features)
        yield from ()

    def _get_queue_num(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        yield Reply(wire.reply_u64(Request.GET_QUEUE_NUM, spec.QUEUE_COUNT))

    def _ignore(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        yield from ()

    def _get_status(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        yield Reply(wire.reply_u64(Request.GET_STATUS, self._device.status))

    def _set_status(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        status = wire.parse_u64(payload)
        if status > 0xFF:
            raise PeerError(f"a status of {status:#x} has more than 8 bits")
        if status:
            self._on_effect(self._device.write_status(status))
        else:
            yield from self._reset(payload, fds)

    def _reset(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        yield from self._rings.forget_all(enabled=self._starts_enabled, unused=True)
        self._rings.forget_bases()
        self._reset_device()

    def _reset_device(self) -> None:
        self._note_actual()
        self._on_effect(self._device.reset())

    def _note_actual(self) -> None:
        """Remember what the driver said last of its balloon, before that is forgotten."""
        if self._device.actual_bytes:
            self._stale_actual = self._device.actual_bytes, self._device.counters.inflated_bytes

    def _rest(self) -> Steps:
        """The driver may be gone from now on, and the front-end has no way to say so."""
        yield from self._rings.rest()
        if self._config_changed:
            yield from self.ask_for_life()

    def _set_channel(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        self._channel = True
        yield SetChannel(fds[0])

    # Memory.

    def _change_memory(
        self, make: Callable[[int], MapTable | MapRegion | UnmapRegion], regions: list[MemoryRegion]
    ) -> Steps:
        """Change the memory under quiet rings, and start those again that ran.

        :raise Refused: it could not be done; memory is as it was.
        """
        stopped: tuple[int, ...] = ()
        if self._starts_enabled:
            yield from self._rings.rest()
        else:
            stopped = yield from self._rings.stop(self.running)
        error = yield make(next(self._tokens))
        if error is None:
            self._rings.regions = regions
        yield from self._rings.restart(stopped)
        yield from self.ask_for_life()
        if error is not None:
            raise Refused(error)

    def _set_mem_table(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        regions = wire.parse_memory_table(payload)
        if len(fds) != len(regions):
            raise PeerError(f"{len(fds)} fds for {len(regions)} regions")
        table = tuple(file_region(region, fd) for region, fd in zip(regions, fds, strict=True))
        yield from self._change_memory(lambda token: MapTable(token, table), list(regions))

    def _get_max_mem_slots(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        yield Reply(wire.reply_u64(Request.GET_MAX_MEM_SLOTS, wire.REGIONS_MAX))

    def _add_mem_reg(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        region = wire.parse_single_region(payload)
        if len(self._rings.regions) >= wire.REGIONS_MAX:
            raise PeerError(f"more than {wire.REGIONS_MAX} regions")
        added = file_region(region, fds[0])
        yield from self._change_memory(lambda token: MapRegion(token, added), [*self._rings.regions, region])

    def _rem_mem_reg(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        if len(fds) > 1:  # one is allowed, and closed: some front-ends send it
            raise PeerError(f"{len(fds)} fds, at most 1")
        gone = wire.parse_single_region(payload)
        left = [region for region in self._rings.regions if not is_same_region(region, gone)]
        if len(left) == len(self._rings.regions):
            raise Refused(f"no region of {gone.size:#x} bytes at guest address {gone.guest_address:#x}")
        yield from self._change_memory(lambda token: UnmapRegion(token, gone.guest_address), left)

    # Rings.

    def _set_vring_num(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        state = wire.VringState.parse(payload)
        ring = self._rings[state.index]
        if not 0 < state.num <= spec.QUEUE_SIZE_MAX or state.num & (state.num - 1):
            raise PeerError(f"a size of {state.num} is not a power of two up to {spec.QUEUE_SIZE_MAX}")
        yield from self._rings.change(state.index, Request.SET_VRING_NUM, moves=state.num != ring.size)
        ring.size = state.num
        yield from self._rings.start(state.index)

    def _set_vring_base(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        state = wire.VringState.parse(payload)
        ring = self._rings[state.index]
        if state.num > 0xFFFF:
            raise PeerError(f"a base of {state.num} has more than 16 bits")
        yield from self._rings.change(state.index, Request.SET_VRING_BASE, moves=True)
        if ring.asked_base not in (None, state.num):  # nobody goes on here: it is another driver's ring
            self._note_actual()
            self._device.forget_driver()
        ring.base, ring.base_known, ring.asked_base = state.num, True, None
        yield from self._rings.start(state.index)

    def _set_vring_addr(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        address = wire.VringAddress.parse(payload)
        ring = self._rings[address.index]
        if address.flags:
            raise PeerError(f"flags {address.flags:#x}: a dirty log was not offered")
        same = address == ring.address
        if ring.running and same and Request.SET_VRING_ADDR in ring.told:
            return
        yield from self._rings.change(address.index, Request.SET_VRING_ADDR, moves=not same)
        ring.address = address
        yield from self._rings.start(address.index)

    def _get_vring_base(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        index = wire.VringState.parse(payload).index
        self._rings[index]
        base = yield from self._rings.ask_base(index)
        yield Reply(wire.reply(Request.GET_VRING_BASE, wire.VringState(index, base).pack()))

    def _set_vring_enable(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        state = wire.VringState.parse(payload)
        if state.num > 1:
            raise PeerError(f"a ring is enabled with 1 and disabled with 0, not with {state.num}")
        if state.num:
            self._rings[state.index].enabled = True
            yield from self._rings.start(state.index)
        else:
            yield from self._rings.disable(state.index)

    def _vring_fd(self, payload: bytes, fds: tuple[int, ...]) -> tuple[int, int | None]:
        index, with_fd = wire.parse_vring_fd(payload)
        if len(fds) != with_fd:
            raise PeerError(f"{len(fds)} fds for ring {index}, not {int(with_fd)}")
        self._rings[index]
        return index, fds[0] if fds else None

    def _set_vring_kick(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        index, fd = self._vring_fd(payload, fds)
        if fd is None:
            raise PeerError(f"ring {index} has no kick fd, and is not polled here")
        yield from self._rings.stop((index,))
        self._rings[index].kick = True
        yield SetKick(index, fd)
        yield from self._rings.start(index)

    def _set_vring_call(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        index, fd = self._vring_fd(payload, fds)
        yield SetCall(index, fd)
        yield from self._rings.revive((index,))

    def _set_vring_err(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        index, fd = self._vring_fd(payload, fds)
        yield SetErr(index, fd)
        yield from self._rings.revive((index,))

    # Configuration space.

    def _get_config(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        window = wire.ConfigSpace.parse(payload)
        answer = b""  # how the protocol says that the window cannot be read
        if window.size and window.offset + window.size <= wire.CONFIG_BYTES_MAX:
            data = self._device.read_config(window.offset, window.size)
            answer = wire.ConfigSpace(window.offset, window.size, window.flags, data).pack()
        yield from self._rings.revive(ALL)  # only a driver that is there reads it
        yield Reply(wire.reply(Request.GET_CONFIG, answer))

    def _set_config(self, payload: bytes, fds: tuple[int, ...]) -> Steps:
        window = wire.ConfigSpace.parse(payload)
        if len(window.payload) != window.size:
            raise PeerError(f"{len(window.payload)} bytes for a window of {window.size}")
        if window.offset + window.size > wire.CONFIG_BYTES_MAX:
            raise PeerError(
                f"{window.size} bytes at offset {window.offset}, the end is {wire.CONFIG_BYTES_MAX}"
            )
        if window.flags > 1:
            raise PeerError(f"flags {window.flags:#x} are neither a driver's write (0) nor a migration (1)")
        self._on_effect(self._device.write_config(window.offset, self._without_stale_actual(window)))
        whole_actual = window.offset <= Config.ACTUAL and window.offset + window.size >= Config.ACTUAL + 4
        if self._starts_enabled and whole_actual and not self._device.actual_bytes:
            yield from self._rest()  # a driver empties its balloon and says so, and then resets the device

    def _without_stale_actual(self, window: wire.ConfigSpace) -> bytes:
        """Return a write without an `actual` that is the last driver's.

        QEMU sends its whole copy of the configuration space with each write of the guest's, and nothing
        renews that copy when the driver resets the device.
        """
        start = Config.ACTUAL - window.offset
        is_copy = window.offset < Config.ACTUAL and window.offset + window.size > Config.ACTUAL + 4
        if window.flags or not is_copy:
            return window.payload
        written = int.from_bytes(window.payload[start : start + 4], "little") << PAGE_SHIFT
        if not written or (written, self._device.counters.inflated_bytes) != self._stale_actual:
            return window.payload
        now = (self._device.actual_bytes >> PAGE_SHIFT).to_bytes(4, "little")
        return window.payload[:start] + now + window.payload[start + 4 :]


def file_region(region: MemoryRegion, fd: int) -> FdRegion:
    """Return a region in the words of `GuestMemory`."""
    return FdRegion(fd, region.size, region.mmap_offset, region.guest_address, shared_file=True)


def is_same_region(one: MemoryRegion, other: MemoryRegion) -> bool:
    """Whether REM_MEM_REG of one means the other: where it lies in its file does not count."""
    return (one.guest_address, one.user_address, one.size) == (
        other.guest_address,
        other.user_address,
        other.size,
    )


NOTHING: Final = ProtocolFeature(0)
CONFIG: Final = ProtocolFeature.CONFIG
SLOTS: Final = ProtocolFeature.CONFIGURE_MEM_SLOTS
STATUS: Final = ProtocolFeature.STATUS


@dataclass(frozen=True)
class Rule:
    """The form of one request; None for what its handler checks itself."""

    handler: Callable[[Backend, bytes, tuple[int, ...]], Steps]
    payload_bytes: int | None = 0
    fds: int | None = 0
    answers: bool = False  # the handler sends an answer of its own
    needs: ProtocolFeature = NOTHING


RULES: Final[dict[int, Rule]] = {
    Request.GET_FEATURES: Rule(Backend._get_features, answers=True),
    Request.SET_FEATURES: Rule(Backend._set_features, wire.U64_BYTES),
    Request.SET_OWNER: Rule(Backend._ignore),
    Request.RESET_OWNER: Rule(Backend._ignore),  # deprecated; the protocol lets us ignore it
    Request.SET_MEM_TABLE: Rule(Backend._set_mem_table, None, None),
    Request.SET_VRING_NUM: Rule(Backend._set_vring_num, wire.VRING_STATE_BYTES),
    Request.SET_VRING_ADDR: Rule(Backend._set_vring_addr, wire.VRING_ADDRESS_BYTES),
    Request.SET_VRING_BASE: Rule(Backend._set_vring_base, wire.VRING_STATE_BYTES),
    Request.GET_VRING_BASE: Rule(Backend._get_vring_base, wire.VRING_STATE_BYTES, answers=True),
    Request.SET_VRING_KICK: Rule(Backend._set_vring_kick, wire.U64_BYTES, None),
    Request.SET_VRING_CALL: Rule(Backend._set_vring_call, wire.U64_BYTES, None),
    Request.SET_VRING_ERR: Rule(Backend._set_vring_err, wire.U64_BYTES, None),
    Request.GET_PROTOCOL_FEATURES: Rule(Backend._get_protocol_features, answers=True),
    Request.SET_PROTOCOL_FEATURES: Rule(Backend._set_protocol_features, wire.U64_BYTES),
    Request.GET_QUEUE_NUM: Rule(Backend._get_queue_num, answers=True),  # it is enough that MQ is offered
    Request.SET_VRING_ENABLE: Rule(Backend._set_vring_enable, wire.VRING_STATE_BYTES),
    Request.SET_BACKEND_REQ_FD: Rule(Backend._set_channel, fds=1, needs=ProtocolFeature.BACKEND_REQ),
    Request.GET_CONFIG: Rule(Backend._get_config, None, answers=True, needs=CONFIG),
    Request.SET_CONFIG: Rule(Backend._set_config, None, needs=CONFIG),
    Request.RESET_DEVICE: Rule(Backend._reset),  # it is enough that RESET_DEVICE is offered
    Request.GET_MAX_MEM_SLOTS: Rule(Backend._get_max_mem_slots, answers=True, needs=SLOTS),
    Request.ADD_MEM_REG: Rule(Backend._add_mem_reg, wire.SINGLE_REGION_BYTES, 1, needs=SLOTS),
    Request.REM_MEM_REG: Rule(Backend._rem_mem_reg, wire.SINGLE_REGION_BYTES, None, needs=SLOTS),
    Request.GET_STATUS: Rule(Backend._get_status, answers=True, needs=STATUS),
    Request.SET_STATUS: Rule(Backend._set_status, wire.U64_BYTES, needs=STATUS),
}
