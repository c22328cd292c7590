"""What the tests with a real guest need of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from balloon.testing.uml_files import UmlFiles, UmlUnavailable, choose_memory_folder, find_uml

ROOM = 576 << 20
"""For the memory file of one guest at a time."""


@pytest.fixture(scope="session")
def uml(require: Callable[[str, object, str], None]) -> tuple[UmlFiles, Path]:
    """What a guest is made of, and the folder of its memory file."""
    why = ""
    try:
        files, (folder, _) = find_uml(), choose_memory_folder(ROOM)
    except UmlUnavailable as error:
        why = str(error)
    require("uml", not why, why)
    return files, folder
