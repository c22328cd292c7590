"""What one front-end may take of what all share."""

from __future__ import annotations

import resource

import pytest

from balloon import budget
from balloon.budget import Bucket, Pool, Share, Turns


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_an_owner_keeps_what_it_had_and_the_last_eighth_is_for_those_that_run() -> None:
    pool = Pool(80)
    assert pool.take("a", 40)
    assert pool.take("a", 10)  # no less than before
    assert pool.left == 40
    assert not pool.take("b", 31, last=False)
    assert pool.take("b", 30, last=False)
    assert not pool.take("a", 51)
    assert pool.take("a", 50)
    assert pool.left == 0
    pool.shrink("a", 5)
    pool.free("b")
    assert pool.left == 75


def test_a_bucket_lets_a_burst_through_and_then_a_rate(clock: Clock) -> None:
    bucket = Bucket(3, 0.5)
    assert [bucket.take() for _ in range(5)] == [True] * 3 + [False] * 2
    clock.now += 1
    assert [bucket.take() for _ in range(2)] == [True, False]
    clock.now += 1000
    assert [bucket.take() for _ in range(5)] == [True] * 3 + [False] * 2


def test_a_front_end_alone_is_never_paused(clock: Clock) -> None:
    share = Share(Turns())
    assert not any(share.charge(0.01) for _ in range(1000))


def test_those_that_flood_share_a_part_of_the_loop_and_the_others_go_free(clock: Clock) -> None:
    """A simulation: the flooding ones use no more than their part, whatever their number."""
    turns = Turns()
    cost = 1e-4
    quiet = Share(turns)
    flooding = {number: Share(turns) for number in range(30)}
    free_at = dict.fromkeys(flooding, clock.now)
    used = 0.0
    end = clock.now + 30
    while clock.now < end:
        clock.now += 0.01
        assert quiet.charge(cost / 10) == 0
        for number, share in flooding.items():
            while free_at[number] <= clock.now:
                pause = share.charge(cost)
                turns.paused = sum(at > clock.now for at in free_at.values())
                free_at[number] = clock.now + max(pause, cost)
                used += cost
                if pause:
                    break
    assert used < 30 * 0.6 + len(flooding) * budget.MOST_SECONDS


def test_the_limit_of_fds_is_raised_and_what_is_left_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        few = budget.available_fds()
        assert 0 < few < 256
        budget.raise_fd_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert budget.available_fds() >= few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_few_regions_are_part_of_what_each_session_has() -> None:
    assert budget.session_fds() == budget.session_fds(budget.FDS_IN_PASSING) == budget.FDS_PER_SESSION
    assert budget.session_fds(509) == budget.FDS_PER_SESSION - budget.FDS_IN_PASSING + 509
