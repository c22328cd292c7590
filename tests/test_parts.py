"""Larger pages: given back when all their 4 KiB parts are in the balloon, and never before (CONTRACTS 7)."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon._memory import GuestMap
from balloon._parts import PartsTable
from balloon._worker import Worker
from balloon.device import Effect
from balloon.spec import SLICE_WORK, Feature, Role
from bench import BIG_AT, KIB, MIB, PAGE, PATIENCE, Bench, Events, Gate, Recorder, Steps, thread, until

PARTS = 16
"""In a page of 64 KiB."""

# --------------------------------------------------------------------------------- deflate requests


def test_a_deflate_request_that_is_cut_short_forgets_the_account() -> None:
    """Detached in the middle of it: its head is used, so that what it had not named yet is the guest's too."""
    with Worker() as worker, Bench(worker=worker) as other:
        with Bench(ram_bytes=8 * MIB, big=MIB, worker=worker) as bench, Steps() as steps, Recorder(steps):
            bench.driver.inflate(bench.parts(3, range(8)))
            assert bench.device.partial_bytes == 8 * PAGE
            # Two slices, with the page's parts in the second.
            numbers = [bench.first_page + 1000] * SLICE_WORK + bench.parts(3, range(8))
            head = bench.post_pages(numbers, Role.DEFLATE, at=bench.base)
            for _ in range(3):  # other has its turn, then the deflate request, then other again
                other.post_report()
                other.kick(Role.REPORTING)
                bench.kick(Role.DEFLATE)
                steps.inside()
                if bench.device.counters.deflated_bytes:
                    break
                steps.go()
            worker.detach(bench.native(Role.DEFLATE))
            steps.open()
            worker.wait_detached(bench.native(Role.DEFLATE))
            assert bench.queue(Role.DEFLATE).take_used() == [head]
            assert bench.device.counters.cut_chains == 1
            assert bench.device.counters.deflated_bytes < (SLICE_WORK + 8) * PAGE
            assert bench.device.partial_bytes == 0
            bench.driver.inflate(bench.parts(3, range(8, 16)))
            assert bench.gone() == []
            assert bench.device.partial_bytes == 8 * PAGE


def test_the_account_is_forgotten_while_a_worker_keeps_it() -> None:
    """As when another queue of the device stops, again and again, in the middle of inflate requests."""
    size = 32 * MIB
    with Worker() as worker, Bench(big=size, worker=worker) as bench:
        numbers = [part for page in range(size // bench.page) for part in bench.parts(page)]
        done = threading.Event()

        def guest() -> None:
            try:
                for _ in range(400):
                    head = bench.post_pages(numbers, at=bench.base)
                    bench.driver.kick(Role.INFLATE)
                    bench.driver.wait(Role.INFLATE, [head])
            finally:
                done.set()

        device, plane = bench.device, bench.device._plane
        with thread(guest):
            while not done.is_set():
                plane.forget_parts()
                assert device.partial_bytes <= size
        plane.forget_parts()
        assert device.partial_bytes == 0
