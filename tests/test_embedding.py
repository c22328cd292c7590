"""docs/embedding.md is one program: its blocks are run in order, and what they print stands below them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "embedding.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "\x1e"  # ASCII's record separator: no block prints it

RUNNER = f"""
import sys
names = {{"__name__": "__main__"}}
for number, block in enumerate(sys.stdin.read().split({MARK!r})):
    exec(compile(block, f"block {{number}} of docs/embedding.md", "exec"), names)
    sys.stdout.write({MARK!r})
"""


def programs() -> list[tuple[str, str]]:
    """Each block of Python, with the block of text right below it."""
    found: list[tuple[str, str]] = []
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "python":
            found.append((text, ""))
        elif kind == "text":
            program, printed = found.pop()
            assert not printed, "two blocks of text below one of Python"
            found.append((program, text))
    return found


def test_every_block_prints_what_stands_below_it() -> None:
    blocks = programs()
    assert len(blocks) >= 12
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=MARK.join(program for program, _ in blocks),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    printed = done.stdout.split(MARK)
    assert printed.pop() == ""
    assert printed == [text for _, text in blocks]


def test_every_block_is_python_or_what_it_prints() -> None:
    assert {kind for kind, _ in BLOCK.findall(PAGE.read_text())} == {"python", "text"}
    assert PAGE.read_text().count("```") == 2 * len(BLOCK.findall(PAGE.read_text()))


def test_a_vmm_of_each_loop_is_about_ten_lines() -> None:
    for name in ("asyncio_vmm", "polling_vmm", "trio_vmm"):
        (body,) = (
            match[0]
            for program, _ in programs()
            for match in re.finditer(rf"^(async )?def {name}\(.*?(?=^\S)", program, re.MULTILINE | re.DOTALL)
        )
        assert 5 <= len(body.strip().splitlines()) <= 12


def test_what_the_page_links_to_is_there() -> None:
    text = PAGE.read_text()
    links = re.findall(r"\]\((?!http)(.+?)\)", text) + [
        f"../{name}" for name in re.findall(r"`(tests/\S+?\.py)`", text)
    ]
    assert len(links) >= 5
    for link in links:
        assert (PAGE.parent / link).exists(), link
