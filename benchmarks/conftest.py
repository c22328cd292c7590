"""What all benchmarks share: the timer of `harness`, and facts of the machine for the JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import CLOCK

import balloon
from balloon._reclaim import Reclaimer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=True, warmup=False))


def first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except OSError:
        return "?"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the figures depend on."""
    del config
    machine_info.clear()
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = first_line("/proc/meminfo").split()
    machine_info |= {
        "cpu": model[0] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / (1 << 20)),
        "kernel": platform.release(),
        "hypervisor": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "thp": first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "gcc": subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True).stdout.strip(),
        "vectored": Reclaimer().vectored,
        "balloon": balloon.__version__,
    }
