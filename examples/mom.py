"""The guests of a `Server` in the shape in which oVirt's MOM wants a hypervisor.

MOM (Memory Overcommitment Manager) reads guests and sets balloons through four methods. Its sizes are KiB,
and its balloon is what is *left* to the guest, ours what is *taken*. It calls from threads of its own; the
server stays in its loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from balloon.errors import BalloonError
from balloon.serve import Server, Session

T = TypeVar("T")
KIB = 1024


class MomHypervisor:
    """Four methods for MOM, to call from any thread but the loop's.

    Guests go by the number of their front-end. `failed` is what a call raises for a guest that has gone or
    does not answer: MOM's own `HypervisorInterfaceError` makes its collectors go on without.
    """

    def __init__(
        self,
        server: Server,
        loop: asyncio.AbstractEventLoop,
        *,
        timeout: float = 5.0,
        failed: type[Exception] = RuntimeError,
    ) -> None:
        self.server = server
        self.loop = loop
        self.timeout = timeout
        self.failed = failed

    def getVmList(self) -> list[int]:
        """The guests whose driver is up."""

        async def look() -> list[int]:
            return [guest.number for guest in self.server.sessions if guest.backend.running]

        return self._run(look())

    def getVmMemoryStats(self, number: int) -> dict[str, int]:
        """What the guest says of its memory now; only what it has sent. `mem_available` is all it has."""
        stats = self._run(self._ask(number))
        found = {
            "mem_available": (stats.total_bytes, KIB),
            "mem_unused": (stats.free_bytes, KIB),
            "swap_in": (stats.swap_in_bytes, KIB),
            "swap_out": (stats.swap_out_bytes, KIB),
            "major_fault": (stats.major_faults, 1),
            "minor_fault": (stats.minor_faults, 1),
        }
        return {name: value // unit for name, (value, unit) in found.items() if value is not None}

    def getVmBalloonInfo(self, number: int) -> dict[str, int]:
        """What the guest has with an empty balloon, and what it has now."""

        async def look() -> dict[str, int]:
            guest = self._guest(number)
            most = guest.memory.size
            return {"balloon_max": most // KIB, "balloon_cur": (most - guest.device.actual_bytes) // KIB}

        return self._run(look())

    def setVmBalloonTarget(self, number: int, left: int) -> None:
        """Leave so many KiB to the guest."""

        async def tell() -> None:
            guest = self._guest(number)
            taken = max(0, guest.memory.size - left * KIB)
            guest.set_target(taken // 4096 * 4096)

        self._run(tell())

    async def _ask(self, number: int) -> Any:
        return await self._guest(number).request_stats(self.timeout)

    def _guest(self, number: int) -> Session:
        for guest in self.server.sessions:
            if guest.number == number:
                return guest
        raise self.failed(f"guest {number} is not there any more")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the server's loop, and wait for it."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop).result(self.timeout + 5)
        except (BalloonError, TimeoutError) as error:
            raise self.failed(str(error)) from error
