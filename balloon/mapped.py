"""The guest memory of one front-end: what is taken, how much of it, and where it is mapped.

Only files that can answer are taken, within the bytes that a front-end may have. Every call on such a file
runs aside, so that a slow one holds no other guest.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Protocol, TypeAlias, TypeVar

from balloon import budget
from balloon._kernel import file_kind
from balloon.errors import ConfigError, StateError
from balloon.memory import FdRegion, GuestMemory
from balloon.vhost_user.actions import MapRegion, MapTable, UnmapRegion

__all__ = ["Change", "MappedMemory", "MemoryHost", "RunAside"]

T = TypeVar("T")
Change: TypeAlias = MapTable | MapRegion | UnmapRegion
"""The actions that change guest memory."""

_log = logging.getLogger(__name__)


class MemoryHost(Protocol):
    """What the memory of a front-end needs of the server."""

    mapped: budget.Pool
    """The bytes of guest memory that sessions may map, together."""

    @property
    def any_file(self) -> bool:
        """Whether guest memory may lie in a file of any file system."""

    @property
    def discard_hugetlb(self) -> bool:
        """Whether huge pages of hugetlbfs are given back."""

    @property
    def memory_max(self) -> int:
        """Bytes of guest memory that one front-end may map."""


class Owner(Protocol):
    """Who has the memory: its bytes are counted as this one's."""

    number: int
    """Counts the front-ends of a server, from 1."""


class RunAside(Protocol):
    """Runs what may wait where nobody else waits."""

    async def __call__(self, function: Callable[[], T]) -> T:
        """Run a function, and return what it returns."""


class MappedMemory:
    """Changes `memory`, within the budgets of its front-end.

    `use_own_worker` is called before memory is mapped that may be slow; `warn` logs a line.
    """

    def __init__(
        self,
        host: MemoryHost,
        owner: Owner,
        memory: GuestMemory,
        run_aside: RunAside,
        *,
        use_own_worker: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self._host = host
        self._owner = owner
        self._memory = memory
        self._run_aside = run_aside
        self._use_own_worker = use_own_worker
        self._warn = warn

    async def change(self, action: Change) -> str | None:
        """Carry out an action, while no ring is attached; return why it failed."""
        try:
            match action:
                case MapTable(_, regions):
                    table = [self._own(region) for region in regions]
                    await self._map(regions, lambda: self._memory.replace(table), replaces=True)
                case MapRegion(_, region):
                    await self._map((region,), lambda: self._add(region), replaces=False)
                case UnmapRegion(_, guest_address):
                    await self._run_aside(lambda: self._remove(guest_address))
        except OSError as error:
            if not self._is_in_force(action):
                return str(error)
            self._warn(f"memory that went was not given up in order: {error}")
        except (ConfigError, StateError) as error:
            return str(error)
        return None

    def settle(self) -> None:
        """A change is done with: count the bytes that are mapped now."""
        self._host.mapped.shrink(self._owner, self._memory.size)

    def close(self) -> None:
        """Free the memory, which may take its time; for the background."""
        while True:
            try:
                return self._memory.close()
            except StateError:  # not to be freed where the last reference is dropped
                _log.exception("front-end %d: its memory stays mapped", self._owner.number)
            except OSError as error:
                return _log.error(
                    "front-end %d: its memory was not freed in order: %s", self._owner.number, error
                )

    def _is_in_force(self, action: Change) -> bool:
        """Whether a change was made that has failed: what goes is given up after it."""
        there = {(region.guest_address, region.size) for region in self._memory.regions}
        match action:
            case MapTable(_, regions):
                return there == {(region.guest_address, region.size) for region in regions}
            case MapRegion(_, region):
                return (region.guest_address, region.size) in there
            case UnmapRegion(_, guest_address):
                return all(address != guest_address for address, _ in there)

    async def _map(
        self, regions: tuple[FdRegion, ...], change: Callable[[], object], *, replaces: bool
    ) -> None:
        """Map files within the budget.

        :raise ConfigError: a file is of a kind that is not taken, or there are too many bytes.
        """
        wanted, held = sum(region.size for region in regions), self._memory.size
        most, pool = self._host.memory_max, self._host.mapped
        if wanted + held * (not replaces) > most:
            raise ConfigError(
                f"{wanted + held * (not replaces)} bytes of guest memory: too many (a front-end may have "
                f"{most}). Raise memory_max, or --memory-max of balloon serve"
            )
        if not pool.take(self._owner, wanted + held):  # for a moment both are mapped
            raise ConfigError(
                f"{wanted} bytes of guest memory: no room (all front-ends together may have {pool.total})"
            )
        kinds = await self._run_aside(lambda: {file_kind(region.fd) for region in regions})
        if "unknown" in kinds and not self._host.any_file:
            raise ConfigError(
                "a memory file of unknown kind: not taken, since it may never answer (memfd, tmpfs, "
                "hugetlbfs and local disks are taken). Allow it by any_file, or --any-file of balloon serve"
            )
        if kinds - {"memory"}:
            self._use_own_worker()
        await self._run_aside(change)

    def _own(self, region: FdRegion) -> FdRegion:
        """A region as the server wants it."""
        return dataclasses.replace(region, discard_hugetlb=self._host.discard_hugetlb)

    def _add(self, region: FdRegion) -> None:
        self._memory.add_fd(
            region.fd,
            region.size,
            offset=region.offset,
            guest_address=region.guest_address,
            shared_file=region.shared_file,
            discard_hugetlb=self._host.discard_hugetlb,
        )

    def _remove(self, guest_address: int) -> None:
        for known in self._memory.regions:
            if known.guest_address == guest_address:
                self._memory.remove(known)
