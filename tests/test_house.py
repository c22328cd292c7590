"""The rules of the house: floors, file lengths, lint, types, stubs, and what is shipped.

CONTRIBUTING.md tells the reader about them. `ROOMS` is the truth about the floors.
"""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors", "spec", "_spec", "_atomics", "_pthread", "_kernel"),
    ("_memory", "_bell"),
    ("_ring", "_reclaim", "_parts", "_waiter"),
    ("_fill",),
    ("_hints", "_statistics"),
    ("_drain",),
    ("_plane", "_slots"),
    ("_queue", "_reactor"),
    ("_runner", "_swap", "backing"),
    ("_worker", "memory", "stats", "config", "counters", "hinting"),
    ("virtio", "snapshot"),
    ("device", "line", "registers"),
    ("transport",),
    ("mmio", "pci", "vhost_user"),
    ("testing", "aside"),
    ("control", "metrics", "plot", "sockets", "guest", "kicks", "budget", "disposal"),
    ("served", "mapped", "output", "lobby"),
    ("session",),
    ("serve", "demo"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""The floors, lowest first. A file imports from lower floors only, a package is one room."""

FLOOR = {room: floor for floor, row in enumerate(ROOMS) for room in row}
LENGTH = {".py": 700, ".pyi": 700, ".pyx": 650, ".pxd": 400, ".pxi": 400, ".h": 400}
"""A long file is a smell: these bounds only stop a file that nobody would read."""


class Import(NamedTuple):
    """One arrow: `target` is a dotted name below `balloon`, perhaps with a name in that module at its end."""

    line: int
    target: str
    typing_only: bool = False


def sources(package: Path) -> list[Path]:
    """List the files that people write, below the folder of the package."""
    return sorted(path for path in package.rglob("*") if path.suffix in LENGTH)


def parent_of(path: Path, package: Path) -> str:
    """Return the dotted name of the package that the file is in."""
    return ".".join(["balloon", *path.relative_to(package).parent.parts])


def absolute(module: str, parent: str) -> str:
    """Resolve the leading dots of a relative import in a module of `parent`."""
    name = module.lstrip(".")
    dots = len(module) - len(name)
    if not dots:
        return module
    parts = parent.split(".")
    base = parts[: len(parts) - dots + 1]
    return ".".join([*base, name] if name else base)


class PythonImports(ast.NodeVisitor):
    """Collects the imports of a Python file, in functions and under TYPE_CHECKING too."""

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.found: list[Import] = []
        self.typing_only = False

    def add(self, line: int, target: str) -> None:
        self.found.append(Import(line, absolute(target, self.parent), self.typing_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            self.add(node.lineno, f"{absolute(module, self.parent)}.{alias.name}")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                self.add(node.lineno, first.value)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            self.generic_visit(node)
            return
        outer, self.typing_only = self.typing_only, True
        for child in node.body:
            self.visit(child)
        self.typing_only = outer
        for child in node.orelse:
            self.visit(child)


COMMENT_OR_STRING = re.compile(
    r"""(?P<long>\"{3}.*?\"{3}|'{3}.*?'{3})|\#[^\n]*|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""",
    re.S,
)
NATIVE_IMPORT = re.compile(
    r"""^[ \t]*(?:
        from[ \t]+(?P<module>[\w.]+)[ \t]+c?import[ \t]+(?P<names>\([^)]*\)|[^\n;]+)
        | c?import[ \t]+(?P<modules>[^\n;]+)
        | include[ \t]+["'](?P<include>[^"']+)["']
        | cdef[ \t]+extern[ \t]+from[ \t]+["'](?P<header>[^"'<>]+)["']
        | \#[ \t]*include[ \t]+"(?P<c_include>[^"]+)"
    )""",
    re.M | re.X,
)


def without_comments(text: str) -> str:
    """Blank comments and long strings out of Cython text; its lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        return match["string"] or "\n" * match[0].count("\n")

    return COMMENT_OR_STRING.sub(blank, text).replace("\\\n", "  ")


def native_imports(path: Path, package: Path) -> Iterator[Import]:
    """Yield the imports, cimports and includes of a Cython file or a C header."""
    parent = parent_of(path, package)
    text = path.read_text()
    if path.suffix != ".h":
        text = without_comments(text)
    for match in NATIVE_IMPORT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["module"]:
            for name in match["names"].strip("()").split(","):
                if name.strip():
                    yield Import(line, f"{absolute(match['module'], parent)}.{name.split()[0]}")
        elif match["modules"]:
            for name in match["modules"].split(","):
                yield Import(line, name.split()[0])
        elif match["include"]:
            yield Import(line, f"{parent}.{Path(match['include']).stem}")
        else:
            header = Path(match["header"] or match["c_include"])
            if (package / header.name).exists():  # else it is the system's
                yield Import(line, f"balloon.{header.stem}")


def imports(path: Path, package: Path) -> list[Import]:
    """List what a file of ours imports from `balloon`."""
    if path.suffix in {".py", ".pyi"}:
        visitor = PythonImports(parent_of(path, package))
        visitor.visit(ast.parse(path.read_text(), str(path)))
        found = visitor.found
    else:
        found = list(native_imports(path, package))
    return [item for item in found if item.target.split(".")[0] == "balloon"]


def floor_faults(package: Path) -> list[str]:
    """List every file without a floor, every arrow that does not go down and every circle in a package."""
    faults = []
    circles: dict[str, dict[str, set[str]]] = {}
    files = sources(package)
    modules = {".".join([parent_of(path, package), path.stem]) for path in files}
    rooms = {path.relative_to(package).parts[0].partition(".")[0] for path in files}
    for path in files:
        place = path.relative_to(package)
        room = place.parts[0].partition(".")[0]
        if room not in FLOOR:
            faults.append(
                f"balloon/{place} has no floor: add {room!r} to ROOMS in tests/test_house.py "
                "and to the table in CONTRIBUTING.md"
            )
            continue
        for item in imports(path, package):
            parts = item.target.split(".")
            target = parts[1] if len(parts) > 1 and (parts[1] in FLOOR or parts[1] in rooms) else "__init__"
            if target != room:
                if FLOOR.get(target, len(ROOMS)) >= FLOOR[room]:
                    faults.append(
                        f"balloon/{place}:{item.line} imports {target}, which is on floor "
                        f"{FLOOR.get(target)}, from floor {FLOOR[room]}"
                    )
            elif len(place.parts) > 1 and path.suffix != ".pyi" and not item.typing_only:
                inner = ".".join(parts[:3])
                inner = inner if len(parts) > 2 and inner in modules else f"balloon.{room}.__init__"
                own = f"balloon.{room}.{place.stem}"
                if inner != own:
                    circles.setdefault(room, {}).setdefault(own, set()).add(inner)
    for room, graph in circles.items():
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            faults.append(f"a circle in balloon/{room}: {' <- '.join(error.args[1])}")
    return list(dict.fromkeys(faults))


def tracked() -> list[Path]:
    """List the files of the tree that are, or would be, in git, relative to its root."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
        env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        listed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        paths = [Path(name) for name in listed.split("\0") if name]
        return [path for path in paths if (ROOT / path).is_file()]
    # An unpacked sdist: what .gitignore would say, in short.
    made = re.compile(
        r"(\.venv|build|dist|\.\w+_cache|\.cache|\.hypothesis|\.benchmarks|__pycache__|.*\.egg-info)$"
    )
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not made.match(name)]
        found += [(Path(folder) / name).relative_to(ROOT) for name in names if not name.endswith(".so")]
    return [path for path in found if path.name not in {"PKG-INFO", "setup.cfg"}]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Run a tool of this environment, without the switches of the build; fail with its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("BALLOON_")}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    words = [str(word) for word in command]
    result = subprocess.run(
        words,
        cwd=cwd,
        env={**env, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.stdout.write(result.stdout)
        pytest.fail(
            f"{Path(words[0]).name} {' '.join(words[1:4])}: status {result.returncode}", pytrace=False
        )


def test_every_import_goes_down() -> None:
    faults = floor_faults(ROOT / "balloon")
    assert not faults, "\n".join(faults)


def test_the_readers_table_of_floors_is_this_one() -> None:
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    told = {
        int(floor): [re.split(r"[./]", name)[0] for name in re.findall(r"`(.+?)`", names)]
        for floor, names in rows
    }
    assert told == {floor: list(row) for floor, row in enumerate(ROOMS)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attic.py", ""),
        ("attic/__init__.py", ""),
        ("attic.h", ""),
        ("memory.py", "from balloon.device import Balloon"),
        ("memory.py", "from balloon import device"),
        ("memory.py", "from . import device"),
        ("memory.py", "from .device import Balloon"),
        ("memory.py", "import balloon.device as d"),
        ("memory.py", "import balloon"),
        ("memory.py", "from balloon import Balloon"),
        ("memory.py", "from balloon import stats"),
        ("memory.py", "def f():\n    from balloon import device"),
        ("memory.py", "if TYPE_CHECKING:\n    from balloon import device"),
        ("memory.py", "importlib.import_module('balloon.device')"),
        ("memory.pyi", "from .device import Balloon"),
        ("spec.py", "from balloon import errors"),
        ("vhost_user/backend.py", "from ..serve import main"),
        ("vhost_user/backend.py", "from ..testing import Driver"),
        ("vhost_user/__init__.py", "from .. import testing"),
        ("testing/_shared.pyx", "from ..serve import main"),
        ("_ring.pyx", "from balloon._reclaim cimport a"),
        ("_ring.pyx", "from balloon cimport _memory, _reclaim"),
        ("_ring.pyx", "from balloon._worker cimport (\n    a,\n    b,\n)"),
        ("_ring.pyx", "cimport balloon._worker as w"),
        ("_ring.pyx", "cdef f():\n    from balloon.memory import GuestMemory"),
        ("_ring.pxd", "from ._reclaim cimport a"),
        ("_memory.pyx", 'include "_ring.pxi"'),
        ("_atomics.h", '#include "_ring.h"'),
    ],
)
def test_wrong_arrow_is_seen(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "_ring.h").touch()
    path.write_text(text)
    (fault,) = floor_faults(tmp_path)
    assert name in fault


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.py", "import os\nfrom balloon import errors, spec\nfrom balloon._memory import GuestMap"),
        ("vhost_user/backend.py", "from .. import device\nfrom . import messages"),
        ("testing/_shared.pyx", 'cdef extern from "_atomics.h":\n    pass\nfrom balloon._spec cimport A'),
        (
            "_ring.pyx",
            '"""\nfrom balloon import serve\n"""\n# import balloon.serve\ncdef extern from "memory.h": pass',
        ),
        ("__main__.py", "from balloon.cli import main"),
    ],
)
def test_right_arrow_passes(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert not floor_faults(tmp_path)


def test_circle_in_a_package_is_seen(tmp_path: Path) -> None:
    (tmp_path / "testing").mkdir()
    (tmp_path / "testing" / "__init__.py").write_text("from .driver import Driver")
    (tmp_path / "testing" / "driver.py").write_text("from . import ram")
    ram = tmp_path / "testing" / "ram.py"
    for text in ("from .driver import Driver", "from balloon.testing import Driver"):
        ram.write_text(f"if TYPE_CHECKING:\n    {text}")
        assert not floor_faults(tmp_path)
        ram.write_text(text)
        (fault,) = floor_faults(tmp_path)
        assert "circle" in fault


@pytest.mark.parametrize("path", sources(ROOT / "balloon"), ids=lambda path: path.name)
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LENGTH[path.suffix], (
        f"{path.name} has {lines} lines: find its second job, and give that a room"
    )


def test_ruff() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


def test_mypy() -> None:
    run(sys.executable, "-m", "mypy", "--strict", "-p", "balloon")


def test_every_native_module_has_a_stub() -> None:
    # stubtest says nothing if a module with an underscore has none.
    files = sources(ROOT / "balloon")
    native = [path.with_suffix(".pyi") for path in files if path.suffix == ".pyx"]
    assert native == [path for path in files if path.suffix == ".pyi"]


def test_stubs_tell_the_truth(tmp_path: Path) -> None:
    # The native modules only: of the others stubtest has nothing to compare but the file with itself.
    native = sorted((ROOT / "balloon").rglob("*.pyx"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in native]
    allowed = tmp_path / "allowed"
    allowed.write_text(r".*\.__pyx_capi__" + "\n")  # what a .pxd exports to other native modules
    run(sys.executable, "-m", "mypy.stubtest", "--allowlist", allowed, "--ignore-unused-allowlist", *names)


def test_cython_lint() -> None:
    files = [path for path in sources(ROOT / "balloon") if path.suffix in {".pyx", ".pxd", ".pxi"}]
    run("cython-lint", *files)


def test_no_path_of_a_developers_machine() -> None:
    private = re.compile(r"(?<![\w.$}])/(?:work|root|home/\w+|Users/\w+|tmp/(?:plan|h\d|v))/")
    faults = []
    for path in tracked():
        text = (ROOT / path).read_text(errors="replace")
        faults += [f"{path}: {match[0]}" for match in private.finditer(text)]
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist from a copy of what is in git; the copy is gone afterwards."""
    tree = tmp_path_factory.mktemp("tree")
    for path in tracked():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path)
    out = tmp_path_factory.mktemp("sdist")
    run(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})",
        cwd=tree,
    )
    shutil.rmtree(tree)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from the sdist alone, with what is installed here and without the network."""
    out = tmp_path_factory.mktemp("wheel")
    parallel = out / "parallel.cfg"
    parallel.write_text(f"[build_ext]\nparallel = {os.cpu_count()}\n")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "-w", out, sdist, DIST_EXTRA_CONFIG=str(parallel))
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_sdist_is_what_is_in_git(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {Path(*Path(item.name).parts[1:]) for item in archive if item.isfile()}
    made = {path for path in inside if path.parts[0].endswith(".egg-info")} | {
        Path("PKG-INFO"),
        Path("setup.cfg"),
    }
    assert sorted(inside - made) == sorted(path for path in tracked() if path != Path(".gitignore"))


@pytest.mark.slow
def test_wheel_has_what_runs_and_no_c(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {Path(name) for name in archive.namelist()}
    ours = {path for path in inside if path.parts[0] == "balloon"}
    assert {path.parts[0].rpartition(".")[2] for path in inside - ours} == {"dist-info"}
    assert not {path for path in inside if path.suffix in {".c", ".h"}}
    tree = {path for path in tracked() if path.parts[0] == "balloon"}
    wanted = {path for path in tree if path.suffix in {".py", ".pyi"} or path.name == "py.typed"}
    assert not wanted - ours
    native = {path.with_suffix("") for path in tree if path.suffix == ".pyx"}
    assert {path.parent / path.name.partition(".")[0] for path in ours if path.suffix == ".so"} == native


@pytest.mark.slow
def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    files = [
        path.relative_to(tmp_path) for path in tmp_path.glob("balloon/**/*") if path.suffix in {".py", ".so"}
    ]
    names = [".".join([*path.parent.parts, path.name.partition(".")[0]]) for path in sorted(files)]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    found = importlib.import_module(name.removesuffix('.__init__')).__file__\n"
        f"    assert found.startswith({str(tmp_path)!r}), (name, found)\n"
    )
    names = [name for name in names if not name.endswith(".__main__")]
    run(sys.executable, "-P", "-W", "error", "-c", program, *names, cwd=tmp_path, PYTHONPATH=str(tmp_path))
