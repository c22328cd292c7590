"""The C files beside this one, compiled with the optimisation of our own modules and loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

__all__ = ["build_c", "compile_c"]

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-fPIC", "-shared", "-pthread")


def build_c(name: str) -> Path:
    """Build `name`.c beside this file as a shared library, unless that was done.

    :raise CalledProcessError: it cannot be; `stderr` says why.
    """
    source = HERE / f"{name}.c"
    key = hashlib.sha256(source.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = BUILD / f"{name}-{key}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        half = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", *FLAGS, "-o", half, source], check=True, capture_output=True, text=True)
        half.rename(target)
    return target


@functools.cache
def compile_c(name: str) -> ctypes.CDLL:
    """Build and load `name`.c, once."""
    return ctypes.CDLL(str(build_c(name)), use_errno=True)
