"""The native modules of balloon and the three switches of their build.

BALLOON_DEBUG=1     asserts, bounds checks, warnings are errors, -O0 -g
BALLOON_TRACE=1     line tracing, for Cython.Coverage
BALLOON_SANITIZE=1  AddressSanitizer and UndefinedBehaviorSanitizer

All metadata is in pyproject.toml.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = [
    "balloon._bell",
    "balloon._drain",
    "balloon._fill",
    "balloon._hints",
    "balloon._kernel",
    "balloon._memory",
    "balloon._parts",
    "balloon._plane",
    "balloon._queue",
    "balloon._reactor",
    "balloon._reclaim",
    "balloon._ring",
    "balloon._runner",
    "balloon._slots",
    "balloon._statistics",
    "balloon._swap",
    "balloon._waiter",
    "balloon._worker",
    "balloon.testing._measure",
    "balloon.testing._shared",
]

debug = os.environ.get("BALLOON_DEBUG") == "1"
trace = os.environ.get("BALLOON_TRACE") == "1"
sanitize = os.environ.get("BALLOON_SANITIZE") == "1"

compile_args = ["-std=gnu11", "-Wall", "-Wextra", "-Wsign-compare", "-Wconversion", "-fvisibility=hidden"]
link_args: list[str] = []
macros: list[tuple[str, str | None]] = [("_GNU_SOURCE", None)]
flavour = "release"
if sanitize:
    flavour = "sanitize"
    compile_args += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    link_args += ["-fsanitize=address,undefined"]
elif debug:
    flavour = "debug"
    compile_args += ["-O0", "-g", "-Werror"]
else:
    compile_args += ["-O2"]
if trace:
    flavour += "-trace"
    macros.append(("CYTHON_TRACE_NOGIL", "1"))

setup(
    ext_modules=cythonize(
        [
            Extension(
                name,
                [name.replace(".", "/") + ".pyx"],
                include_dirs=["balloon"],
                depends=["balloon/_atomics.h", "balloon/_kernel.h"],
                define_macros=macros,
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
            for name in MODULES
        ],
        build_dir=f"build/cython-{flavour}",
        compiler_directives={
            "language_level": 3,
            "embedsignature": True,
            "binding": True,
            "boundscheck": debug,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "auto_pickle": False,
            "autotestdict": False,
            "linetrace": trace,
            "warn.unused": True,
        },
    ),
)
