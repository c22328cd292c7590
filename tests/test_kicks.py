"""`KickWatch`: only what comes after an fd was added is a kick."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from balloon.kicks import KickWatch


@pytest.fixture
def watch() -> Iterator[KickWatch]:
    made = KickWatch()
    yield made
    made.close()


@pytest.fixture
def kicks() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
    yield fds
    for fd in fds:
        os.close(fd)


def is_readable(watch: KickWatch) -> bool:
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def test_a_kick_from_before_does_not_count(watch: KickWatch, kicks: list[int]) -> None:
    os.eventfd_write(kicks[0], 1)  # never read: the fd stays readable
    watch.add(kicks[0])
    assert not is_readable(watch)
    assert not watch.take()
    os.eventfd_write(kicks[0], 1)
    assert is_readable(watch)
    assert watch.take()
    assert not watch.take()


def test_adding_one_fd_loses_no_kick_of_another(watch: KickWatch, kicks: list[int]) -> None:
    watch.add(kicks[0])
    os.eventfd_write(kicks[0], 1)
    watch.add(kicks[1])
    watch.add(kicks[1])
    assert watch.take()
    assert not watch.take()


def test_an_fd_that_is_watched_no_longer_says_nothing(watch: KickWatch, kicks: list[int]) -> None:
    watch.add(kicks[0])
    watch.add(kicks[1])
    watch.discard(kicks[0])
    watch.discard(kicks[0])
    os.eventfd_write(kicks[0], 1)
    assert not watch.take()
    os.eventfd_write(kicks[1], 1)
    assert watch.take()
    watch.add(kicks[0])
    assert not watch.take()
