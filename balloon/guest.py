"""One guest as an event loop sees it: what it is asked for, and who awaits its answer.

Whoever waits for the guest is let go when it answers, at a deadline, or when it goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from balloon.aside import Aside
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, StateError
from balloon.hinting import HintingRound, HintState, Ranges
from balloon.spec import Feature, Role
from balloon.stats import Stats

if TYPE_CHECKING:
    from balloon._queue import DataQueue

__all__ = ["SURPLUS_MAX", "Guest", "check_interval", "is_rare"]

SURPLUS_MAX: Final = 20
"""Events in a minute for statistics that answer no request: the guest sets the pace of these."""
RETRY_SECONDS: Final = 1.0
"""After how long it is tried again to do what had to wait for a drain for too long."""
WAITING: Final = ("refused", "hints", "release")
"""News with which the device looks at the guest's memory, or waits for a drain."""

T = TypeVar("T")


class Guest:
    """What `Session` is made of: a device, and those who wait for its guest.

    A subclass has what is done about an effect, and who is told of an event. Only for the loop's thread.
    """

    def __init__(self, device: Balloon, number: int) -> None:
        self.number = number
        """Counts the front-ends of a server, from 1."""
        self.device = device
        """The device. Its target is set through the session, so that the driver is told."""
        self._closed = False
        self._stats: Stats | None = None
        self._stats_waits: dict[int, asyncio.Future[Stats]] = {}
        self._surplus: list[float] = []
        self._poller: asyncio.Task[None] | None = None
        self._hint_wait: asyncio.Future[Ranges] | None = None
        self._aside = Aside(f"balloon front-end {number}")
        self._busy = 0  # how much of the device's goes on there
        self._coming: set[tuple[str, DataQueue]] = set()  # news that wait for it

    # What a subclass has.

    @property
    def _can_tell(self) -> bool:
        """Whether the driver can be told of a change of the configuration space."""
        raise NotImplementedError

    def _apply(self, effect: Effect) -> None:
        """Do what the device has asked for."""
        raise NotImplementedError

    def _report(self, event: str, **details: Any) -> None:
        """Hand an event to whoever wants to know."""
        raise NotImplementedError

    def _ask_for_life(self) -> None:
        """Ask for a sign of life where rings rest because their driver may be gone."""

    async def _wait_for_life(self) -> None:
        """Wait until the driver is known to be there."""

    # What a subclass calls.

    def _on_news(self, kind: str, queue: DataQueue) -> None:
        """The worker tells of a queue: see `Worker.take_events()`. A fault has been told before."""
        if kind not in WAITING:
            self._heard(self.device.on_event(kind, queue))
        elif (kind, queue) not in self._coming:
            self._coming.add((kind, queue))

            def take() -> Effect:
                self._coming.discard((kind, queue))
                return self.device.on_event(kind, queue)

            self._run_on_device(take, self._heard)
        if kind == "fault" and queue.role is Role.HINTING:
            self._end_hint("the hinting ring is broken")
            self.finish_hinting()

    def _heard(self, effect: Effect) -> None:
        """Do what an event, or the end of a round, asks for."""
        if self._closed:
            return
        self._apply(effect)
        if effect & Effect.STATS:
            self._stats_came()
        if effect & Effect.HINTS:
            self._hints_came()

    def _run_on_device(self, function: Callable[[], T], then: Callable[[T], object]) -> None:
        """Call the device where it may wait for a drain, and then `then`, with the result, in the loop.

        A guest whose memory is stuck lets its drains last: the loop waits for none.
        """
        loop = asyncio.get_running_loop()

        def done(result: T) -> None:
            self._busy -= 1
            then(result)
            self._look_at_hinting()

        def failed() -> None:
            self._busy -= 1

        def again() -> None:
            self._busy -= 1
            if not self._closed:
                self._run_on_device(function, then)

        def work() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                try:
                    result = function()
                except StateError:
                    loop.call_soon_threadsafe(loop.call_later, RETRY_SECONDS, again)
                except Exception:
                    loop.call_soon_threadsafe(failed)
                    raise
                else:
                    loop.call_soon_threadsafe(done, result)

        self._busy += 1
        self._aside.submit(work)

    def _look_at_hinting(self) -> None:
        """Rings may have stopped: let go who waits for a round that ended with its ring."""
        if self._busy:  # it may be complete
            return
        if self._hint_wait is not None and self.device.hint_state in (HintState.IDLE, HintState.DONE):
            self._end_hint("the hinting ring stopped before the guest had told all")

    def _let_go(self) -> None:
        """The front-end went away: nobody waits for its guest any more."""
        self._closed = True
        why = f"front-end {self.number} went away"
        self._end_hint(why)
        for wait in self._stats_waits.values():
            if not wait.done():
                wait.set_exception(StateError(why))
        self.set_stats_interval(None)

    # Statistics.

    async def request_stats(self, timeout: float = 5.0) -> Stats:
        """Ask the guest for statistics that are newer than this call; wait `timeout` seconds at most.

        :raise TimeoutError: the guest has not answered. If it still does, that answers no other request.
        :raise StateError: statistics were not offered, or the front-end went away.
        :raise ConfigError: the timeout is not above 0 and finite.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        # Who serves the queue is the worker; between two of its rings' lives nobody does.
        request, _ = self.device.request_stats(loop.time(), timeout, serve=False)
        wait: asyncio.Future[Stats] = loop.create_future()
        self._stats_waits[request.token] = wait
        self._ask_for_life()
        try:
            async with asyncio.timeout_at(request.deadline):
                return await wait
        except TimeoutError:
            raise TimeoutError(f"no statistics of guest {self.number} within {timeout:g} seconds") from None
        finally:
            del self._stats_waits[request.token]
            self.device.cancel_stats(request.token)

    def set_stats_interval(self, seconds: float | None) -> None:
        """Ask for statistics every so many seconds from now on; None or 0 ends that.

        Every update is a "stats" event of the server, asked for or not. A guest that does not answer is
        asked at the same pace.

        :raise ConfigError: it is negative or not finite.
        :raise StateError: statistics were not offered.
        """
        seconds = check_interval(seconds)
        if seconds and not self.device.device_features & Feature.STATS_VQ:
            raise StateError("statistics were not offered: make the device with stats=True")
        if self._poller is not None:
            self._poller.cancel()
            self._poller = None
        if seconds:
            self._poller = asyncio.get_running_loop().create_task(self._poll(seconds))

    async def _poll(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._closed:  # whatever becomes of one request, the next one is made
            with contextlib.suppress(TimeoutError, StateError):
                await self.request_stats(seconds)
            due = max(due + seconds, loop.time())
            await asyncio.sleep(due - loop.time())

    def _stats_came(self) -> None:
        stats = self.device.stats
        if stats is None or stats is self._stats:  # of a legacy driver the first values count for nothing
            return
        self._stats = stats
        if stats.token is not None:
            for token, wait in self._stats_waits.items():
                if token <= stats.token and not wait.done():
                    wait.set_result(stats)
        elif not is_rare(self._surplus, SURPLUS_MAX):
            return
        self._report("stats", **stats.as_dict())

    # Free page hinting.

    async def hint(
        self,
        use: Literal["collect", "reclaim"] = "collect",
        *,
        unsafe_reclaim: bool = False,
        dirty_check: Callable[[Ranges], Any] | None = None,
        hold: bool = False,
        timeout: float = 30.0,
    ) -> Ranges:
        """Ask the guest which memory it does not use; wait until it has told all, `timeout` seconds at most.

        Returns the ranges of a "collect" round: shape (n, 2), guest address and size in bytes. See
        `Balloon.start_hinting` for `use` and what goes with it. With `hold` the guest keeps the pages until
        `finish_hinting()`. A round that another one replaces, and one whose waiting is cancelled, is over.

        :raise TimeoutError: the guest has not told all; the round is finished.
        :raise StateError: there is no way to tell the driver, or no hinting queue runs; or while waiting the
            ring stopped, another round began, or the front-end went away.
        :raise ConfigError: "reclaim" is not allowed like this, or the timeout is not above 0 and finite.
        """
        self._check_open()
        if not 0 < timeout < math.inf:
            raise ConfigError(f"a timeout of {timeout} seconds is not finite and above 0")
        if not self._can_tell:
            raise StateError("the front-end has no channel, so that its driver cannot be told")
        try:
            async with asyncio.timeout(timeout):
                await self._wait_for_life()
        except TimeoutError:
            raise TimeoutError(
                f"guest {self.number}: no driver answered within {timeout:g} seconds"
            ) from None
        begun: list[HintingRound] = []
        given_up = False

        def begin() -> Effect:
            if given_up:
                return Effect.NONE
            started, effect = self.device.start_hinting(
                use, hold=hold, unsafe_reclaim=unsafe_reclaim, dirty_check=dirty_check
            )
            begun.append(started)
            return effect

        try:
            async with asyncio.timeout(timeout):
                effect = await self._aside.run(begin)
                self._check_open()
                self._end_hint("another hinting round has begun")
                wait: asyncio.Future[Ranges] = asyncio.get_running_loop().create_future()
                self._hint_wait = wait
                self._apply(effect)
                self._look_at_hinting()  # the ring may have stopped meanwhile
                return await wait
        except (TimeoutError, asyncio.CancelledError) as error:
            given_up = True
            self._run_on_device(
                lambda: self.device.finish_hinting(begun[0]) if begun else Effect.NONE, self._finished
            )
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"guest {self.number} gave no hints within {timeout:g} seconds") from None
            raise

    def finish_hinting(self) -> None:
        """The hinted pages are needed no longer: the guest may use them. Nothing if no round goes on.

        It returns at once; the guest is told as soon as the drain under way has ended. Call it in the loop's
        thread.
        """
        self._run_on_device(self.device.finish_hinting, self._finished)

    def _finished(self, effect: Effect) -> None:
        """A round was finished here."""
        self._heard(effect | Effect.HINTS)

    def _hints_came(self) -> None:
        """Let go who waits for a round that is complete or finished."""
        wait = self._hint_wait
        if wait is not None and self.device.hint_state in (HintState.COMPLETE, HintState.DONE):
            self._run_on_device(self.device.hinted_ranges, lambda ranges: self._give_hints(wait, ranges))

    def _give_hints(self, wait: asyncio.Future[Ranges], ranges: Ranges) -> None:
        if self._hint_wait is wait:
            self._hint_wait = None
        if not wait.done():
            wait.set_result(ranges)

    def _end_hint(self, why: str) -> None:
        """Let go who waits for a round that will not be complete."""
        wait, self._hint_wait = self._hint_wait, None
        if wait is not None and not wait.done():
            wait.set_exception(StateError(why))

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(f"front-end {self.number} went away")


def is_rare(times: list[float], most: int) -> bool:
    """Note that it happened once more; whether it happened `most` times at most in the last minute."""
    now = asyncio.get_running_loop().time()
    times[:] = [*[then for then in times if then > now - 60][-most:], now]
    return len(times) <= most


def check_interval(seconds: float | None) -> float | None:
    """Return an interval for statistics, None where there is none.

    :raise ConfigError: it is negative or not finite.
    """
    if seconds is not None and not 0 <= seconds < math.inf:
        raise ConfigError(f"invalid interval: {seconds} seconds (0 or above, and finite). Give 0 for none")
    return seconds or None
