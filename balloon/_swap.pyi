import threading
from collections.abc import Iterator
from typing import Generic, TypeVar, final

from balloon._memory import GuestMap, Lease
from balloon._plane import DataPlane
from balloon._queue import DataQueue

_L = TypeVar("_L")

@final
class MapSwitch(Generic[_L]):
    map: GuestMap
    layout: _L
    def __new__(cls, memory: GuestMap, layout: _L) -> MapSwitch[_L]: ...
    def add(self, plane: DataPlane) -> None: ...
    def __iter__(self) -> Iterator[DataPlane]: ...
    def barrier(self, timeout: float) -> None: ...
    def swap(
        self, new: GuestMap, layout: _L, leases: tuple[Lease, ...], timeout: float
    ) -> tuple[_L, list[DataQueue]]: ...

@final
class Turn:
    def __new__(cls, lock: threading.Lock, timeout: float) -> Turn: ...
    def __enter__(self) -> None: ...
    def __exit__(self, kind: object, error: object, trace: object) -> None: ...
