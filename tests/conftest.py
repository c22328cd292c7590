"""What all tests share: which build is tested, what must not be skipped, what must not be left open.

BALLOON_EXPECT_BUILD=FOLDER  the run ends at once unless every native module comes from below FOLDER
BALLOON_REQUIRE=uml,hugetlb  what `require` asks for by these names fails where it would be skipped
"""

from __future__ import annotations

import gc
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

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
