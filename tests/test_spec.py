"""The numbers of the standard: one truth in spec.py, a copy for native code in _spec.pxd."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balloon import spec

DECLARATIONS = Path(__file__).resolve().parents[1] / "balloon" / "_spec.pxd"
ENTRY = re.compile(r"    ([A-Z][A-Z0-9_]*) = (\d+|0x[0-9a-fA-F]+)")
OTHER = re.compile(r"cdef enum:|")


def native_numbers() -> list[tuple[str, int]]:
    """Read every name and number of _spec.pxd; nothing else may stand there but `cdef enum:` and comments."""
    numbers = []
    for line in DECLARATIONS.read_text().splitlines():
        text = line.partition("#")[0].rstrip()
        entry = ENTRY.fullmatch(text)
        if entry:
            numbers.append((entry[1], int(entry[2], 0)))
        else:
            assert OTHER.fullmatch(text), f"_spec.pxd has a line that this test cannot compare: {line!r}"
    return numbers


def number_in_spec(name: str) -> int | None:
    """Return the number that spec.py gives the name: ROLE_X is Role.X, FAULT_X is Fault.X."""
    prefix, _, member = name.partition("_")
    enums = {"ROLE": spec.Role, "FAULT": spec.Fault}
    value = enums[prefix].__members__.get(member) if prefix in enums else getattr(spec, name, None)
    return None if value is None else int(value)


@pytest.mark.parametrize(("name", "number"), native_numbers())
def test_native_number_is_that_of_spec(name: str, number: int) -> None:
    assert number_in_spec(name) == number


def test_native_names_stand_once() -> None:
    names = [name for name, _ in native_numbers()]
    assert names
    assert len(names) == len(set(names))


def test_every_fault_has_a_text_and_a_section() -> None:
    # NONE is no fault, and PAYLOAD is the border between two kinds.
    assert set(spec.FAULT_TEXT) == set(spec.Fault) - {spec.Fault.NONE, spec.Fault.PAYLOAD}
    assert all(text and section for text, section in spec.FAULT_TEXT.values())


def test_every_role_has_its_feature() -> None:
    assert list(spec.ROLE_FEATURE) == list(spec.Role)
