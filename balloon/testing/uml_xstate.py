"""A library that lets older User-mode Linux kernels run on processors with AMX.

Older kernels, Linux 6.1 among them, set the vector registers of their processes with a buffer of fixed size.
A host whose processor has AMX has more registers, and refuses such a buffer (ptrace(2), PTRACE_SETREGSET):
the guest's first process dies, and its kernel panics in boot. The library stands between the kernel and
ptrace(2) and fills the buffer up with what the process has. It is loaded with LD_PRELOAD, and compiled at
the first need.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Final

from balloon.testing.uml_files import ToolError, UmlUnavailable, default_cache, run_tool

__all__ = ["find_preload", "needs_preload"]

SOURCE: Final = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

/* User-mode Linux has one processor and its kernel runs in one thread: one buffer is enough. */
static char whole[1 << 16] __attribute__((aligned(64)));

long ptrace(enum __ptrace_request request, ...) {
    static long (*real)(enum __ptrace_request, ...);
    va_list list;
    va_start(list, request);
    pid_t pid = va_arg(list, pid_t);
    void *address = va_arg(list, void *);
    void *data = va_arg(list, void *);
    va_end(list);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
        struct iovec *given = data, full = {whole, sizeof whole};
        if (real(PTRACE_GETREGSET, pid, address, &full) == 0 && full.iov_len > given->iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return real(request, pid, address, &full);
        }
    }
    return real(request, pid, address, data);
}
"""


def needs_preload(cpuinfo: str, machine: str = platform.machine()) -> bool:
    """Return whether the processor that `cpuinfo` (/proc/cpuinfo) describes has AMX."""
    return machine == "x86_64" and any(
        line.startswith("flags") and "amx_tile" in line.split() for line in cpuinfo.splitlines()
    )


def find_preload(cache: Path | None = None) -> Path | None:
    """Return the library to load before a guest's kernel, compiled into `cache` if it is not there yet.

    None where the processor needs none. `cache` is `uml_files.default_cache()` by default.

    :raise UmlUnavailable: there is no C compiler, or the cache cannot be written.
    """
    try:
        if not needs_preload(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")):
            return None
    except OSError:
        return None
    cache = cache or default_cache()
    name = f"xstate-{hashlib.sha256(SOURCE.encode()).hexdigest()[:16]}"
    library = cache / f"{name}.so"
    if library.is_file():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="compile-") as folder:
            source, built = Path(folder) / f"{name}.c", Path(folder) / f"{name}.so"
            source.write_text(SOURCE, encoding="ascii")
            compiler = os.environ.get("CC") or "cc"
            options = ["-O2", "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"]
            run_tool([compiler, *options], timeout=60)
            built.replace(library)
    except (OSError, ToolError) as error:
        raise UmlUnavailable(
            f"User-mode Linux needs a small library on a processor with AMX, and cannot compile it: {error}: "
            f"install gcc and libc6-dev, and make {cache} writable"
        ) from error
    return library
