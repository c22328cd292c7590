"""`Worker.settle()`: everything that is available has been served, or waits for something else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bench import Bench
from test_worker_drain import benches, post_all, settle

from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.errors import StateError
from balloon.spec import Role


@pytest.fixture
def one() -> Iterator[tuple[Worker, Bench]]:
    with benches() as (worker, made):
        yield worker, made[0]


def reporting(bench: Bench) -> DataQueue:
    return bench.device.queue(bench.driver.indices[Role.REPORTING])


def settled(worker: Worker) -> list[DataQueue]:
    return [queue for kind, queue, _ in worker.take_events() if kind == "settled"]


def test_what_is_available_is_served_before_the_event_comes(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    post_all(bench, 3)  # several slices, and not kicked
    worker.settle(reporting(bench))
    while not (told := settled(worker)):
        assert worker.drain(1) == 1
    assert told == [reporting(bench)]
    assert len(bench.queue(Role.REPORTING).take_used()) == 1
    settle(worker)
    assert settled(worker) == []  # once for each call
    bench.post_report(0)
    bench.kick(Role.REPORTING)
    settle(worker)
    assert settled(worker) == []


def test_an_idle_queue_is_settled_at_once(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    worker.settle(reporting(bench))
    worker.settle(reporting(bench))
    worker.drain()
    assert settled(worker) == [reporting(bench)]


def test_what_waits_for_the_rate_holds_nobody(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    bench.device.set_reclaim_rate(1)
    settle(worker)
    for _ in range(2):
        post_all(bench)
        worker.settle(reporting(bench))
        worker.drain()
    assert settled(worker) == [reporting(bench)]


def test_a_queue_with_a_fault_is_settled(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    for _ in range(bench.queue(Role.REPORTING).size + 1):
        bench.queue(Role.REPORTING).make_available(0)
    bench.kick(Role.REPORTING)
    settle(worker)
    assert reporting(bench).fault
    worker.take_events()
    worker.settle(reporting(bench))
    worker.drain()
    assert settled(worker) == [reporting(bench)]


def test_a_queue_that_is_not_attached_is_refused(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    queue = reporting(bench)
    worker.detach(queue)
    with pytest.raises(StateError, match="is being detached"):
        worker.settle(queue)
    worker.wait_detached(queue)
    with pytest.raises(StateError, match="is not attached"):
        worker.settle(queue)
