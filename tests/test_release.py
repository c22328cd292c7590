"""The before-release hook: what it sees, what it says, and what goes on while it is asked (CONTRACTS 9)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from balloon import GuestMemory
from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.device import Effect
from balloon.errors import ConfigError, StateError
from balloon.spec import NOTIFY_SLICES, SLICE_BYTES, SLICE_RANGES, Feature, Role
from bench import BIG_AT, KIB, MIB, PAGE, PATIENCE, Bench, Events, Gate, Recorder, thread, until

# ------------------------------------------------------------------------- what goes on while it is asked


def test_a_queue_that_waits_for_its_hook_leaves_nothing_behind_for_the_next() -> None:
    """Another device of the same worker, without a hook: its ranges are trimmed to whole pages as ever."""
    with Worker() as worker, Bench(worker=worker) as one, Bench(worker=worker) as two:
        with Events(worker, one), Recorder() as kernel, Gate() as gate:
            one.device.set_release_hook(gate, timeout=PATIENCE)
            head = one.post_report(3)
            one.kick(Role.REPORTING)
            until(gate.inside.is_set)
            # Two halves and a whole page: a whole page and a half are not to be touched.
            two.driver.report([(two.base + 5 * PAGE + 2048, 2 * PAGE), (two.base + 9 * PAGE, 2048)])
            assert two.small_gone() == [6]
            assert two.device.counters.advised_bytes == PAGE
            assert two.device.counters.clipped_bytes == PAGE + 2048
            # In order or not, neighbours are one range.
            two.driver.inflate([two.first_page + page for page in (20, 22, 21, 19)])
            assert [len(ranges) for ranges in kernel.calls] == [1, 1]
            gate.open.set()
            assert one.take(1) == [head]
        assert one.small_gone() == [3]
