"""The library that lets older User-mode Linux kernels run on processors with AMX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from balloon.testing import uml_xstate
from balloon.testing.uml_files import UmlUnavailable

AMX = "processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile amx_int8\n"


def test_only_a_processor_with_amx_needs_the_library() -> None:
    assert uml_xstate.needs_preload(AMX, "x86_64")
    assert not uml_xstate.needs_preload(AMX.replace(" amx_tile", ""), "x86_64")
    assert not uml_xstate.needs_preload("model name\t: amx_tile\n", "x86_64")
    assert not uml_xstate.needs_preload(AMX, "aarch64")


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uml_xstate, "needs_preload", lambda cpuinfo: True)


@pytest.mark.usefixtures("needed")
def test_the_library_is_compiled_once_and_can_be_loaded(tmp_path: Path) -> None:
    library = uml_xstate.find_preload(tmp_path)
    assert library is not None
    before = library.stat().st_mtime_ns
    assert uml_xstate.find_preload(tmp_path) == library
    assert library.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [library]
    done = subprocess.run(
        [sys.executable, "-c", "open('/proc/self/maps').read().index('xstate-')"],
        env={"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("needed")
def test_without_a_compiler_the_reason_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    with pytest.raises(UmlUnavailable, match=r"AMX.*no-compiler.*install gcc"):
        uml_xstate.find_preload(tmp_path / "cache")
