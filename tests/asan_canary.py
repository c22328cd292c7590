"""Proof that the sanitizers see: a run without findings says nothing if nothing could have been found.

`make asan` runs this first, under the environment of the tests to come, with the folder of the sanitized
package. A canary is a fault in C, compiled with the flags of setup.py. Each must be reported and must end
its process; a call without a fault must do neither.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import setuptools

ROOT = Path(__file__).resolve().parents[1]

SOURCE = r"""
#include <Python.h>

static volatile size_t size = 16; /* or the compiler knows, and it is not AddressSanitizer that reports */

static PyObject *fine(PyObject *self, PyObject *unused) {
    volatile char *bytes = calloc(1, size);
    (void)self, (void)unused;
    bytes[15] = 1;
    free((void *)bytes);
    Py_RETURN_NONE;
}

static PyObject *read_past_end(PyObject *self, PyObject *unused) {
    volatile char *bytes = calloc(1, size);
    (void)self, (void)unused;
    return PyLong_FromLong(bytes[16]);
}

static PyObject *read_past_object(PyObject *self, PyObject *object) {
    (void)self;
    return PyLong_FromLong(((volatile char *)PyBytes_AS_STRING(object))[PyBytes_GET_SIZE(object) + 1]);
}

static PyObject *misaligned_store(PyObject *self, PyObject *unused) {
    static _Alignas(8) char bytes[16];
    (void)self, (void)unused;
    *(volatile unsigned *)(bytes + 1) = 1;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"fine", fine, METH_NOARGS, ""},
    {"read_past_end", read_past_end, METH_NOARGS, ""},
    {"read_past_object", read_past_object, METH_O, ""},
    {"misaligned_store", misaligned_store, METH_NOARGS, ""},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "canary", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit_canary(void) { return PyModule_Create(&module); }
"""

CANARIES = {
    "read_past_end()": "heap-buffer-overflow",
    "read_past_object(bytes(100))": "heap-buffer-overflow",
    "misaligned_store()": "store to misaligned address",
}


def build(folder: Path) -> None:
    """Compile the canaries with what setup.py passes for the package's own modules."""
    passed: dict[str, Any] = {}
    os.environ["BALLOON_SANITIZE"] = "1"
    with contextlib.chdir(ROOT), mock.patch("setuptools.setup", passed.update):
        runpy.run_path("setup.py")
    like = passed["ext_modules"][0]
    source = folder / "canary.c"
    source.write_text(SOURCE)
    canary = setuptools.Extension(
        "canary",
        [str(source)],
        define_macros=like.define_macros,
        extra_compile_args=like.extra_compile_args,
        extra_link_args=like.extra_link_args,
    )
    with contextlib.chdir(folder):
        setuptools.setup(
            name="canary",
            ext_modules=[canary],
            script_args=["-q", "build_ext", "--inplace", "--build-temp", str(folder)],
        )


def run_apart(folder: Path, call: str, preload: str) -> subprocess.CompletedProcess[str]:
    """Run one call in a process of its own, under the tests' environment; "survived" if it comes back."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", f"import canary; canary.{call}; print('survived')"],
        env={**os.environ, "LD_PRELOAD": preload, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def main() -> int:
    """Return 0 if every canary was seen and every module is instrumented."""
    package = Path(sys.argv[1]).resolve()
    preload = os.environ.pop("LD_PRELOAD")  # the compiler is not what is being tested
    bad = []
    modules = sorted(package.rglob("*.so"))
    if not modules:
        bad.append(f"no native module below {package}")
    for module in modules:
        code = module.read_bytes()
        if b"__asan_init" not in code or b"__ubsan_handle" not in code:
            bad.append(f"{module.name} is not instrumented")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        control = run_apart(folder, "fine()", preload)
        if control.returncode != 0 or control.stdout != "survived\n" or control.stderr:
            bad.append(
                f"a call without a fault: status {control.returncode}, {control.stderr or control.stdout}"
            )
        for call, report in CANARIES.items():
            run = run_apart(folder, call, preload)
            if report not in run.stderr:
                bad.append(f"{call} was not reported: {run.stderr or run.stdout!r}")
            if run.returncode == 0 or "survived" in run.stdout:
                bad.append(f"{call} was not fatal: status {run.returncode}")
    for line in bad:
        sys.stderr.write(f"asan canary: {line}\n")
    if not bad:
        sys.stdout.write(f"asan canary: {len(CANARIES)} of {len(CANARIES)} faults reported and fatal\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
