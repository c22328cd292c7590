"""What all tests share: which build is tested, what must not be skipped, what must not be left open.

BALLOON_EXPECT_BUILD=FOLDER  the run ends at once unless every native module comes from below FOLDER
BALLOON_REQUIRE=uml,hugetlb  what `require` asks for by these names fails where it would be skipped
BALLOON_EXAMPLES=30          so many percent of the examples of the longest random tests: see `bench.examples`
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import HUGE, meminfo
from hypothesis import settings

from balloon._drain import _set_wait

# A time limit for one example fails on a busy machine, and under the sanitizers.
settings.register_profile("balloon", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("balloon")


def pytest_sessionstart() -> None:
    expected = os.environ.get("BALLOON_EXPECT_BUILD")
    if not expected:
        return
    root = Path(expected).resolve()
    modules = [path.relative_to(root) for path in sorted(root.glob("balloon/**/*.so"))]
    if not modules:
        pytest.exit(f"BALLOON_EXPECT_BUILD: no native module below {root}", returncode=3)
    for module in modules:
        name = ".".join([*module.parent.parts, module.name.partition(".")[0]])
        found = importlib.import_module(name).__file__
        if found is None or not Path(found).resolve().is_relative_to(root):
            pytest.exit(f"BALLOON_EXPECT_BUILD: {name} is {found}, not below {root}", returncode=3)


@pytest.fixture(scope="session")
def require() -> Callable[[str, object, str], None]:
    """Return `require(name, condition, reason)`: without the condition it skips, or fails if so asked."""
    names = {name.strip() for name in os.environ.get("BALLOON_REQUIRE", "").split(",")}

    def check(name: str, condition: object, reason: str) -> None:
        if condition:
            return
        if name in names:
            pytest.fail(f"BALLOON_REQUIRE names {name}: {reason}", pytrace=False)
        pytest.skip(f"{name}: {reason}")

    return check


@pytest.fixture
def patient() -> Iterator[None]:
    """Let requests wait for the reclaim rate for as long as it takes, and not for a moment only."""
    _set_wait(1e6)
    yield
    _set_wait()


KINDS = ("anon_inode:", "socket:", "/memfd:")


def open_files() -> Counter[str]:
    """Count the open files of the kinds that this library works with, by kind."""
    gc.collect()
    found: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the folder's own
        if target.startswith(KINDS):
            found[target.partition(":[")[0] if target.startswith("socket:") else target] += 1
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail after the last test if an eventfd, epoll set, socket or memfd is still open."""
    before = open_files()
    yield
    left = open_files() - before
    if not request.session.testsfailed:  # the traceback of a failure keeps alive what its test had
        assert not left, f"the tests left open: {dict(left)}"


HUGE_PAGES = 32
"""How many are reserved: more than any one test takes."""


@pytest.fixture(scope="module")
def huge_pages(require: Callable[[str, object, str], None]) -> Iterator[None]:
    """Huge pages for these tests; those that had to be reserved are given back at the end."""
    require("hugetlb", meminfo("Hugepagesize") == HUGE >> 10, "the default huge page is not 2 MiB")
    path = "/proc/sys/vm/nr_hugepages"
    with open(path, encoding="ascii") as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)  # other runs of these tests on this machine wait
        before = int(pool.read())
        missing = max(0, HUGE_PAGES - meminfo("HugePages_Free") + meminfo("HugePages_Rsvd"))

        def resize(pages: int) -> None:
            with open(path, "w", encoding="ascii") as file:
                file.write(str(pages))

        try:
            if missing:
                try:
                    resize(before + missing)
                except OSError as error:
                    require("hugetlb", False, f"{path}: {error.strerror}")
                pool.seek(0)
                got = int(pool.read()) - before
                require("hugetlb", got == missing, f"of {missing} huge pages the kernel reserved {got}")
            free = meminfo("HugePages_Free")
            yield
            gc.collect()
            assert meminfo("HugePages_Free") == free
        finally:
            if missing:
                with contextlib.suppress(PermissionError):
                    resize(before)
