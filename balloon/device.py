"""`Balloon`: the device as the standard describes it, without any I/O of its own.

`balloon.virtio` has what every virtio device has; here are the protocols of the balloon, statistics and free
page hinting, and what the embedder has a say in. Methods return an `Effect`: what the owner has to do next.
Queues are served either by `notify()`, in the caller's thread, or by a `Worker` that they are attached to,
whose events go to `on_event()`.

Nothing waits for a drain under the device's lock: the state is changed under it before or afterwards. Changes
that have to wait, of the hinting round or the hooks, take turns (`_turn`).

Section of the standard: Traditional Memory Balloon Device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from balloon._plane import Holds, check_outside_hook, run_hook
from balloon._queue import DataQueue
from balloon._ring import SplitRing
from balloon.errors import ConfigError, GuestError, StateError
from balloon.hinting import HintingRound, HintingRounds, HintState, Ranges, merge_ranges
from balloon.memory import GuestMemory
from balloon.snapshot import QueueState, Snapshot
from balloon.spec import HOOK_SECONDS, Config, Feature, Role, Status
from balloon.stats import Stats, StatsProtocol, StatsRequest, history_of
from balloon.virtio import DRIVERS_STATUS, Effect, VirtioDevice

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Balloon", "Effect", "ReleaseHook"]

TRANSPORT_FEATURES: Final = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC

ReleaseHook = Callable[[Ranges], Any]
"""Sees guest ranges, a read-only array of shape (n, 2) with address and size in bytes, before they are
discarded. It returns None or True to let them go, False to keep them, or an array of n booleans."""

_log = logging.getLogger(__name__)


class Balloon(VirtioDevice):
    """A traditional memory balloon device.

    Any thread may call any method, at any moment; hooks are called outside all locks.

    `target_bytes` is what the balloon is to hold, taken from the guest, see `set_target()`. `numbering` says
    which queue is which: "linux" counts only the queues whose features were negotiated, as every Linux does;
    "spec" uses the fixed numbers of the standard's text. A legacy driver (one that does not accept VERSION_1)
    has its rings and payloads in `guest_byteorder`. With `strict` the first thing that the driver gets wrong
    stops the device: `notify()` raises it, a worker parks the queue and tells of a fault.

    :raise ConfigError: the target is negative or not below 16 TiB; the numbering or byte order is unknown.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        reporting: bool = True,
        page_poison: bool = True,
        must_tell_host: bool = True,
        deflate_on_oom: bool = False,
        stats: bool = True,
        hinting: bool = False,
        target_bytes: int = 0,
        numbering: Literal["linux", "spec"] = "linux",
        guest_byteorder: Literal["little", "big"] = "little",
        strict: bool = False,
    ) -> None:
        offered = TRANSPORT_FEATURES
        for wanted, feature in (
            (reporting, Feature.REPORTING),
            (page_poison, Feature.PAGE_POISON),
            (must_tell_host, Feature.MUST_TELL_HOST),
            (deflate_on_oom, Feature.DEFLATE_ON_OOM),
            (stats, Feature.STATS_VQ),
            (hinting, Feature.FREE_PAGE_HINT),
        ):
            if wanted:
                offered |= feature
        super().__init__(
            memory,
            offered=offered,
            target_bytes=target_bytes,
            numbering=numbering,
            guest_byteorder=guest_byteorder,
            strict=strict,
        )
        self._stats = StatsProtocol()
        self._stats_seen = 0
        self._rounds = HintingRounds()
        self._turn = threading.RLock()
        self._ring_gone = False
        self._hook: tuple[ReleaseHook | None, float] = (None, HOOK_SECONDS)
        self._hook_failures = 0

    def reset(self) -> Effect:
        """Back to the beginning: queues stopped, features and status cleared, the target kept.

        Requests for statistics go on waiting until their deadline; a hinting round is forgotten.

        :raise StateError: a worker owns a queue: detach it first; or this is inside a before-release hook.
        """
        return super().reset()

    def _end_driver(self) -> None:
        check_outside_hook()
        with self._in_turn():
            super()._end_driver()
            self._set_hooks()

    def _forget_driver(self) -> None:
        super()._forget_driver()
        self._stats.reset(forget=True)
        self._rounds.reset()
        self._show_id()

    def forget_driver(self) -> None:
        """Forget what the last driver said of its balloon: another one has come without a reset.

        That is `actual_bytes` and `stats`; a hinting round has ended with its ring. What a driver says before
        its queues start stays: features, status and poison value.
        """
        with self._lock:
            self._actual_pages = self._config[Config.ACTUAL] = 0
            self._stats.reset(forget=True)

    def _starting(self, role: Role) -> None:
        if role is Role.STATS:
            self._stats_seen = 0
            self._stats.first_ignored = self.legacy
            self._stats.byteorder = self.guest_byteorder if self.legacy else "little"

    def _stopped(self, role: Role) -> None:
        if role is Role.STATS:
            self._stats.reset()

    def _after_stop(self, role: Role) -> None:
        if role is Role.HINTING:
            self._ring_gone = True
            self._follow_ring()

    def _follow_ring(self) -> None:
        """Finish the round of a hinting ring that stopped; or who has the turn does, and nobody waits."""
        while self._ring_gone and self._turn.acquire(blocking=False):
            try:
                self._ring_gone = False
                self._owe(self.finish_hinting())
            finally:
                self._turn.release()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Change the hinting round or the hooks, as the only thread that does; it may wait for a drain."""
        try:
            with self._turn:
                yield
        finally:
            self._follow_ring()

    def on_event(self, kind: str, queue: DataQueue) -> Effect:
        """Take what a worker tells of a queue, see `Worker.take_events()`; returns what is to be done.

        News of a queue from before a reset say nothing of the device after it (CONTRACTS 10).
        """
        if not self._runs(queue):
            return Effect.NONE
        if kind == "stats":
            return self._statistics_came(queue)
        if kind == "hints":
            return self._hints_moved()
        if kind == "release":
            self._release(queue)
        return super().on_event(kind, queue)

    # Statistics.

    @property
    def stats(self) -> Stats | None:
        """The guest's last statistics, or None if it has sent none since the reset."""
        return self._stats.latest

    @property
    def stats_history(self) -> npt.NDArray[np.void]:
        """The last updates, oldest first: a read-only array of type `balloon.stats.HISTORY`."""
        with self._lock:
            recent = tuple(self._stats.recent)
        return history_of(recent)

    def request_stats(
        self, now: float, timeout: float = 5.0, *, serve: bool = True
    ) -> tuple[StatsRequest, Effect]:
        """Ask the guest for statistics that are newer than this call.

        `now` is a moment of the caller's clock and the deadline another one. The request is answered when
        `stats.token` has come to its token; call `expire_stats()` at the deadline. It is kept while the
        driver is not up, or while the guest's buffer is out. A queue that is not attached is served here,
        unless `serve` is false: then it is left to the worker that it is on its way to, or comes from.
        Where the guest still has the buffer and has not answered, it is notified once more: a notification
        may have been lost while it slept.

        :raise ConfigError: the timeout is not above 0 and finite.
        :raise StateError: STATS_VQ was not offered.
        """
        if not self._offered & Feature.STATS_VQ:
            raise StateError("statistics were not offered: make the device with stats=True")
        with self._lock:
            request = self._stats.request(now, timeout)
            queue = self._queue_of(Role.STATS)
            asked = queue is not None and self._ask_for_statistics(queue)
        effect = Effect.NONE
        if queue is not None and asked and serve and self._plane.worker is None:
            effect = self.notify(queue.index)
        return request, effect

    def expire_stats(self, now: float) -> tuple[int, ...]:
        """The tokens of requests whose deadline has come, which are given up with this."""
        with self._lock:
            return self._stats.expire(now)

    def cancel_stats(self, token: int) -> None:
        """Give a request up. An answer that still comes answers no other request."""
        with self._lock:
            self._stats.cancel(token)

    def _ask_for_statistics(self, queue: DataQueue) -> bool:
        """Have the held buffer used, or the driver notified again that has not answered. Under the lock."""
        if not self._stats.ask and not self._stats.unanswered:
            return False
        try:
            queue.ask()
        except StateError:  # it has just stopped: the request waits for the ring to be set up again
            return False
        if self._stats.held:
            self._stats.asked()
        return True

    def _statistics_came(self, queue: DataQueue) -> Effect:
        came = queue.statistics()
        with self._lock:
            if came is None or came[2] <= self._stats_seen or not self._runs(queue):
                return Effect.NONE
            payload, time_ns, self._stats_seen = came
            self._stats.arrived(payload, time_ns)
            if self._stats.ask:
                self._ask_for_statistics(queue)
        return Effect.STATS

    def _queue_of(self, role: Role) -> DataQueue | None:
        return next((one for one in self._ledger.queues.values() if one.role is role), None)

    # Free page hinting.

    @property
    def hint_state(self) -> HintState:
        """Where free page hinting is."""
        return self._rounds.state

    def start_hinting(
        self,
        use: Literal["collect", "reclaim"] = "collect",
        *,
        hold: bool = False,
        unsafe_reclaim: bool = False,
        dirty_check: Callable[[Ranges], Any] | None = None,
    ) -> tuple[HintingRound, Effect]:
        """Ask the guest which memory it does not use; it keeps those pages until the round is finished.

        "collect" notes ranges for `hinted_ranges()`, for migration and snapshots: start dirty tracking
        before (CONTRACTS 23). "reclaim" gives them back. A guest under pressure takes hinted pages back
        without asking, and a later discard destroys what it has put there: so that needs `unsafe_reclaim`,
        for guests that do not do so, or a `dirty_check`, which sees ranges like a before-release hook and
        says which of them are still unwritten. With `hold` the round stays complete until
        `finish_hinting()`; else it is finished by itself. A round that goes on is replaced.

        :raise StateError: FREE_PAGE_HINT was not negotiated, no hinting queue runs, a drain did not end in
            time, or this is inside a hook.
        :raise ConfigError: "reclaim" with neither of the two, another use, or a `dirty_check` that is not
            callable.
        """
        if use not in ("collect", "reclaim"):
            raise ConfigError(f'hints are to "collect" or to "reclaim", not {use!r}')
        if use == "reclaim" and not unsafe_reclaim and dirty_check is None:
            raise ConfigError("the guest may write to hinted pages: give a dirty_check or unsafe_reclaim")
        check_callable("dirty_check", dirty_check)
        check_outside_hook()
        with self._in_turn():
            if self._queue_of(Role.HINTING) is None:
                raise StateError("no hinting queue runs: no FREE_PAGE_HINT, or the driver is not up")
            with self._lock:  # first: where there is none, the round that goes on is not harmed
                started = HintingRound(self._rounds.new_id(self._plane.hint_stops), use, hold, dirty_check)
            self.finish_hinting(show=False)
            with self._lock:
                self._rounds.begin(started)
            try:
                self._set_hooks()
                self._plane.start_hints(started.id, use == "reclaim")
            except BaseException:
                self._owe(self.finish_hinting())
                raise
            with self._lock:
                self._show_id()
                return started, self._config_effect()

    def finish_hinting(self, only: HintingRound | None = None, *, show: bool = True) -> Effect:
        """The pages are needed no longer, or no hints are wanted any more: show DONE.

        When this returns, no hinted page is being discarded (B11). With `only` nothing happens where another
        round than that one goes on. Without `show` the id that the driver sees stays: another one is about
        to be shown.

        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        if not self._rounds.active:
            return Effect.NONE
        check_outside_hook()
        with self._in_turn():
            if not self._rounds.active or only not in (None, self._rounds.round):
                return Effect.NONE
            self._plane.end_hints()
            effect = Effect.NONE
            with self._lock:
                self._rounds.state = HintState.DONE
                if show:
                    self._show_id()
                    effect = self._config_effect()
            try:
                self._set_hooks()
            except BaseException:
                self._owe(effect)
                raise
            return effect

    def hinted_ranges(self) -> Ranges:
        """The memory that the last "collect" round named: shape (n, 2), guest address and size in bytes.

        Sorted, merged, and only what is guest memory.
        """
        return merge_ranges(self._plane.hints()[0])

    def _hints_moved(self) -> Effect:
        with self._lock:
            state, current = HintState(self._plane.hint_state), self._rounds.round
            if not self._rounds.active or state is HintState.IDLE:  # another thread begins one
                return Effect.NONE
            self._rounds.state = state
        effect = Effect.HINTS
        if state is HintState.COMPLETE and current is not None and not current.hold:
            effect |= self.finish_hinting(current)
        return effect

    def _show_id(self) -> None:
        self._config[Config.FREE_PAGE_HINT_CMD_ID] = self._rounds.shown_id

    # What the embedder has a say in.

    def set_reporting(self, enabled: bool) -> None:
        """Switch free page reporting off and on again, at any moment.

        While it is off, reports are acknowledged and nothing is discarded; Linux does not report those pages
        again before it has used them.
        """
        with self._lock:
            self._plane.reporting = enabled

    def set_reclaim_rate(self, bytes_per_second: int | None) -> None:
        """Discard no more than this in a second, on average; None takes the limit away.

        Requests wait meanwhile, each for a quarter of a second at most: a guest that reports or inflates is
        slowed down. What has waited for so long is acknowledged and stays with the guest, see
        `Counters.late_bytes`. One slice of 32 MiB may go beyond the rate at a time.

        :raise ConfigError: it is not an integer from 1 to below 2^62.
        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        if bytes_per_second is not None:
            good = hasattr(bytes_per_second, "__index__") and not isinstance(bytes_per_second, bool)
            if not good or not 0 < bytes_per_second < 1 << 62:
                raise ConfigError(
                    f"invalid rate: {bytes_per_second!r} bytes/s (a whole number above 0). "
                    "Give None for no limit"
                )
        self._plane.set_rate(bytes_per_second or 0)

    def set_release_hook(self, hook: ReleaseHook | None, *, timeout: float = HOOK_SECONDS) -> None:
        """Have `hook` see all ranges before they are discarded: it may keep them (CONTRACTS 9).

        It is called in the thread that calls `notify()`, or the one that hands a worker's "release" events
        to `on_event()`; in a `Server` that is a thread of the session. Its queue waits meanwhile, others go
        on. An exception is a veto, and so is no answer within `timeout` seconds: requests are acknowledged
        and nothing is discarded. A chain about which the hook is asked several times waits for that long in
        all: some drivers give up after a second. From inside, what would wait for the queue raises
        `StateError`. Without a hook drains pay nothing.

        :raise ConfigError: the hook is not callable, or the timeout is not above 0 and below 10^6 seconds.
        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        check_callable("hook", hook)
        if not isinstance(timeout, int | float) or not 0 < timeout < 1e6:
            raise ConfigError(f"invalid timeout: {timeout!r} seconds (above 0, below 1000000)")
        check_outside_hook()
        with self._in_turn():
            before, self._hook = self._hook, (hook, timeout)  # it is there before it is asked
            try:
                self._set_hooks()
            except BaseException:
                self._hook = before
                raise

    def _set_hooks(self) -> None:
        """Have the ranges wait that somebody wants to see. In turn; waits for a drain."""
        hook, timeout = self._hook
        roles = {Role.INFLATE, Role.REPORTING, Role.HINTING} if hook is not None else set()
        current = self._rounds.round
        if self._rounds.active and current is not None and current.dirty_check is not None:
            roles.add(Role.HINTING)
        self._plane.set_hook(roles, timeout)

    def _release(self, queue: DataQueue) -> None:
        waiting = queue.pending()
        if waiting is None:
            return
        number, raw = waiting
        import numpy as np  # not with the module: it starts threads of its own (CONTRACTS 11)

        ranges = np.frombuffer(raw, dtype=np.uint64).reshape(-1, 2)
        verdict = np.ones(len(ranges), dtype=np.bool_)
        hooks, current = [self._hook[0]], self._rounds.round
        if queue.role is Role.HINTING and current is not None:
            hooks.append(current.dirty_check)
        try:
            for hook in hooks:
                answer = None if hook is None else run_hook(hook, ranges)
                if answer is None:
                    continue
                mask = np.asarray(answer, dtype=np.bool_)
                if mask.shape not in ((), verdict.shape):
                    raise ValueError(f"a verdict of shape {mask.shape} on {len(verdict)} ranges")
                verdict &= mask
        except Exception:
            verdict[:] = False
            with self._lock:
                self._hook_failures += 1
                failures = self._hook_failures
            if failures & (failures - 1) == 0:  # the guest sets the pace, not the log's
                _log.exception("a before-release hook failed (%d times): kept", failures)
        queue.decide(number, verdict.tobytes())

    # Snapshot.

    def snapshot(self) -> dict[str, Any]:
        """The device as plain data, for `restore()` in another place; guest memory is saved by its owner.

        Every queue is quiet then: chains in the middle are used, without what is left of them being
        discarded, and only a statistics buffer may be held. The device can go on afterwards; what it does
        then is not in the snapshot. Requests for statistics, the hook and the rate are the embedder's.

        :raise StateError: a worker owns queues: detach them first; a drain did not end in time; or this is
            inside a hook.
        """
        if self._plane.worker is not None:
            raise StateError("a worker owns queues of this device: detach them first")
        check_outside_hook()
        with self._in_turn(), Holds() as held:
            held.take(self._plane)
            with self._lock:
                return self._snapshot().as_dict()

    def _snapshot(self) -> Snapshot:
        """Under the lock, while every drain is kept out."""
        self._follow_memory()
        queues = []
        for index, queue in sorted(self._ledger.queues.items()):
            next_available, owed = queue.quiesce()
            table, available, used = queue.ring.guest_addresses
            queues.append(QueueState(index, queue.ring.size, table, available, used, next_available, owed))
        return Snapshot(
            offered=int(self._offered),
            accepted=int(self._accepted),
            refused=self._refused,
            status=int(self._status),
            numbering=self.numbering,
            guest_byteorder=self.guest_byteorder,
            failed=self._has_fault(),
            generation=self._config.generation,
            num_pages=self._requested,
            actual=self._config[Config.ACTUAL],
            actual_pages=self._actual_pages,
            poison_val=self._config[Config.POISON_VAL],
            poison=self._poison,
            reporting=self._plane.reporting,
            hinting_id=self._rounds.last_id,
            hinting_done=self._rounds.active or self._rounds.state is HintState.DONE,
            owed=tuple(sorted(self._owed)),
            queues=tuple(queues),
            stats=self._stats.latest,
        )

    def restore(self, data: object) -> Effect:
        """Become the device that `snapshot()` saved; this one is new, on the memory that was saved with it.

        A hinting round that went on is finished: the driver sees DONE. Every ring has to be drained once:
        NOTIFY_AGAIN asks for `notify()` on each queue that runs, a worker does it when it is attached. The
        driver may get a notification too many.

        :raise ConfigError: the data is not a snapshot, or is of a device that offered other features or was
            made with another numbering or byte order, or a ring is not in this memory.
        :raise StateError: this device is not new.

        Whatever is raised, the device is as it was before.
        """
        saved = Snapshot.from_dict(data)
        with self._in_turn(), self.memory._lock, self._lock:
            if self._status or self._ledger.queues:
                raise StateError("only a new device can be restored")
            before = self._state()
            try:
                return self._become(saved)
            except BaseException:
                self._put_back(before)
                raise

    def _become(self, saved: Snapshot) -> Effect:
        """Check all that can be wrong, then change. Under memory's lock and ours."""
        for name, mine in (
            ("offered", int(self._offered)),
            ("numbering", self.numbering),
            ("guest_byteorder", self.guest_byteorder),
        ):
            if getattr(saved, name) != mine:
                raise ConfigError(f"snapshot: {name} is not that of this device, {mine!r}")
        if saved.accepted & ~saved.offered:
            raise ConfigError("snapshot: features were accepted that were not offered")
        if saved.status & ~DRIVERS_STATUS:
            raise ConfigError("snapshot: the status has bits that no driver can set")
        accepted = Feature(saved.accepted)
        rings: list[tuple[int, Role, SplitRing]] = []
        for queue in () if saved.failed else saved.queues:  # these are not served before a reset
            role = self.role(queue.index, accepted)
            if role is None:
                raise ConfigError(f"snapshot: queue {queue.index} does not exist with its features")
            where = asdict(queue)
            del where["index"], where["owed"]
            try:
                rings.append((queue.index, role, self._ring(accepted, **where)))
            except (ConfigError, GuestError) as error:
                raise ConfigError(f"snapshot: {error}") from error
        self._accept(accepted)
        self._owed = set(saved.owed) | {queue.index for queue in saved.queues if queue.owed}
        for index, role, ring in rings:
            self._run(index, role, ring)
        self._refused, self._failed = saved.refused, saved.failed
        self._requested = saved.num_pages
        self._show_target()
        self._config[Config.ACTUAL] = saved.actual
        self._config[Config.POISON_VAL] = saved.poison_val
        self._actual_pages, self._poison = saved.actual_pages, saved.poison
        self._apply_poison()
        self._plane.reporting = saved.reporting
        # Its token was given to somebody elsewhere.
        self._stats.latest = None if saved.stats is None else replace(saved.stats, token=None)
        self._rounds.restore(saved.hinting_id, done=saved.hinting_done)
        self._show_id()
        self._config.restore(saved.generation)
        self._status = Status(saved.status)
        if not self._status & Status.DRIVER_OK:
            return Effect.NONE
        self._plane.live = True
        fault = self._tell_fault() if saved.failed else Effect.NONE
        return Effect.NOTIFY_CONFIG | Effect.NOTIFY_AGAIN | fault

    def _state(self) -> dict[str, Any]:
        """All that `_become()` changes, to be put back where it fails."""
        with self._lock:
            return {
                "own": {name: getattr(self, name) for name in RESTORED},
                "config": self._config.state(),
                "rounds": dict(vars(self._rounds)),
                "latest": self._stats.latest,
                "live": self._plane.live,
                "reporting": self._plane.reporting,
                "stats": (self._stats.first_ignored, self._stats.byteorder, self._stats_seen),
            }

    def _put_back(self, state: dict[str, Any]) -> None:
        """Be again what `_state()` saw, when no queue ran yet. No drain has been on those that run now."""
        with self._lock:
            for queue in self._ledger.queues.values():
                queue.stop()
            for name, value in state["own"].items():
                setattr(self, name, value)
            self._accept(self._accepted)
            self._config.put_back(state["config"])
            vars(self._rounds).update(state["rounds"])
            self._stats.latest = state["latest"]
            self._stats.first_ignored, self._stats.byteorder, self._stats_seen = state["stats"]
            self._plane.live = state["live"]
            self._plane.reporting = state["reporting"]


RESTORED: Final = (
    "_accepted",
    "_status",
    "_actual_pages",
    "_poison",
    "_refused",
    "_failed",
    "_fault_told",
    "_early",
    "_later",
    "_requested",
    "_warned",
    "_owed",
    "_ledger",
)
"""The attributes of its own that a device takes from a snapshot; there `_owed` is replaced, not changed."""


def check_callable(name: str, value: object) -> None:
    """Refuse what can never be called, where it is given.

    :raise ConfigError: it is neither callable nor None.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"invalid {name}: {value!r} (a callable). Give a function, or None")
