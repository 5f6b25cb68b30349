"""The shape of the code, read from its imports: who may know whom, how long a file may be, what may import torch.

architecture.md's table in one place. A failure says which line to change and what the ways out are.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = SRC / "veneer"

RANKS: dict[int, tuple[str, ...]] = {
    0: ("errors", "files", "yaml_file", "registry", "types", "adapter"),
    1: ("ops",),
    2: ("base",),
    3: ("models", "methods", "inits"),
    4: ("formats", "data"),
    5: ("inject", "algebra", "plan", "diagnose"),
    6: ("merge", "engine"),
    7: ("evaluate", "library"),
    8: ("train",),
    9: ("server", "lab"),
    10: ("cli",),
}
RANK = {name: rank for rank, names in RANKS.items() for name in names}

# Edges that point up on purpose, resolved by name when they are first used.
DYNAMIC = {
    ("veneer.adapter", "veneer.formats"): "Adapter.load and Adapter.save find the file format",
    ("veneer.adapter", "veneer.methods"): "Adapter.delta asks the part's method",
}
# veneer/__init__ re-exports public names lazily; its type-only imports are for editors and mypy.
LAZY = "veneer"

FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_LINES = 450
WITHOUT_TORCH = ("scheduler", "kvcache", "slots")
HEAVY = ("torch", "transformers")


@dataclass(frozen=True)
class Edge:
    """`module` imports `target` at `line`; `when`: "load", "call" (inside a function), "types" (type checking only)."""

    module: str
    target: str
    line: int
    when: str

    def __str__(self) -> str:
        return f"{path_of(self.module).relative_to(SRC.parent)}:{self.line} imports {self.target}"


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def path_of(module: str) -> Path:
    path = SRC.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


def unit(module: str) -> str:
    """The package or rank-0 module that a dotted name belongs to: veneer.ops.norm -> ops."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else LAZY


class _Imports(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.module = module
        self.edges: list[Edge] = []
        self.when = ["load"]

    def add(self, target: str, line: int) -> None:
        self.edges.append(Edge(self.module, target, line, self.when[-1]))

    def _inside(self, when: str, nodes: list[ast.stmt]) -> None:
        self.when.append(when)
        for node in nodes:
            self.visit(node)
        self.when.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._inside("call", node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self._inside("types", node.body)
            self._inside(self.when[-1], node.orelse)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.module}:{node.lineno} uses a relative import; write `from veneer.x import y`"
        source = node.module or ""
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            is_module = source.startswith("veneer") and path_of(submodule).exists()
            self.add(submodule if is_module or source == LAZY else source, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rsplit(".", 1)[-1]
        if name == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
            self.add(str(node.args[0].value), node.lineno)
        self.generic_visit(node)


def parsed(path: Path) -> ast.Module:
    """The syntax tree. CPython 3.11 counts the recursion of all threads as one; where two meet, it raises SystemError."""
    for _ in range(3):
        try:
            return ast.parse(path.read_text(), filename=str(path))
        except SystemError:
            continue
    return ast.parse(path.read_text(), filename=str(path))


@cache
def edges() -> tuple[Edge, ...]:
    found: list[Edge] = []
    for path in files():
        visitor = _Imports(name_of(path))
        visitor.visit(parsed(path))
        found += visitor.edges
    return tuple(found)


def inner_edges() -> Iterator[Edge]:
    """Edges within veneer, without the two kinds that are dynamic on purpose."""
    for edge in edges():
        if edge.target.split(".")[0] == "veneer" and edge.module != LAZY and (edge.module, edge.target) not in DYNAMIC:
            yield edge


def fail_if(problems: list[str], ways_out: str) -> None:
    if problems:
        pytest.fail("\n".join(problems) + f"\nWhat to do: {ways_out}", pytrace=False)


def test_every_package_has_a_rank() -> None:
    units = {unit(name_of(path)) for path in files()} - {LAZY}
    fail_if(
        [f"veneer.{name} has no rank" for name in sorted(units - set(RANK))],
        "put it into a package that exists, or give it a rank in RANKS here and in docs/map.md, and a page in docs/why/",
    )


def test_imports_point_down() -> None:
    problems = []
    for edge in inner_edges():
        mine, theirs = unit(edge.module), unit(edge.target)
        if mine == theirs or theirs not in RANK:
            continue
        if RANK[theirs] > RANK[mine]:
            problems.append(f"{edge}: rank {RANK[mine]} looks up at rank {RANK[theirs]}")
        elif RANK[theirs] == RANK[mine] != 0:
            problems.append(f"{edge}: {mine} and {theirs} are siblings of rank {RANK[mine]}")
    fail_if(
        problems,
        "pass the thing in as an argument, declare a Protocol where it is used, or move what both need to a lower rank",
    )


def test_nobody_imports_the_public_face() -> None:
    problems = [str(e) for e in inner_edges() if unit(e.target) not in RANK and e.target != "veneer.__version__"]
    fail_if(problems, "import from the module that defines the name, not from `veneer`; only __version__ lives there")


def test_the_dynamic_edges_are_still_used() -> None:
    used = {(e.module, e.target) for e in edges()}
    fail_if([f"{pair} is allowed but gone" for pair in DYNAMIC if pair not in used], "remove it from DYNAMIC")


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for edge in inner_edges():
        graph.setdefault(edge.module, set()).add(edge.target)
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> list[str]:
        if module in trail:
            return [" -> ".join((*trail[trail.index(module) :], module))]
        if module in done:
            return []
        found = [cycle for target in sorted(graph.get(module, ())) for cycle in walk(target, (*trail, module))]
        done.add(module)
        return found

    fail_if(
        [cycle for module in sorted(graph) for cycle in walk(module, ())],
        "move what both need into a third file, or pass it in; inside a package import from files, not from the package",
    )


def test_no_forbidden_names() -> None:
    problems = [str(p.relative_to(SRC)) for p in PACKAGE.rglob("*") if p.stem.strip("_") in FORBIDDEN]
    fail_if(problems, "name the file for the one thing it does")


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files()}
    problems = [f"{path.relative_to(SRC)} has {n} lines" for path, n in lengths.items() if n > MAX_LINES]
    fail_if(problems, "split it by noun; the aim is 400 lines a file")


def test_bookkeeping_and_cli_do_not_import_torch() -> None:
    problems = []
    for edge in edges():
        bookkeeping = edge.module.rsplit(".", 1)[-1] in WITHOUT_TORCH and unit(edge.module) == "engine"
        light = bookkeeping or unit(edge.module) in (
            "cli",
            "errors",
            "files",
            "yaml_file",
            "registry",
            "types",
            "adapter",
            LAZY,
        )
        if light and edge.when == "load" and edge.target.split(".")[0] in HEAVY:
            problems.append(str(edge))
    fail_if(problems, "import it inside the function that uses it, or under TYPE_CHECKING for an annotation")


def test_transformers_is_never_imported_at_load() -> None:
    problems = [str(e) for e in edges() if e.when == "load" and e.target.split(".")[0] == "transformers"]
    fail_if(problems, "import it inside the function that needs it: it costs seconds at start-up")


def test_no_rival_is_imported() -> None:
    rivals = {"peft", "bitsandbytes", "xllamacpp", "llama_cpp", "vllm", "unsloth"}
    problems = [str(e) for e in edges() if e.target.split(".")[0] in rivals]
    fail_if(problems, "rivals belong in tests (mark `parity`) and in benchmarks/peers")


def test_every_import_is_declared() -> None:
    """What src imports is in pyproject.toml: a start-up cost or a missing package is never inherited by accident."""
    project = tomllib.loads((SRC.parent / "pyproject.toml").read_text())["project"]
    extras = {
        name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "parity", "all")
    }
    lists = [project["dependencies"], *extras.values()]
    declared = {_normal(re.split(r"[^\w.-]", line)[0]) for lines in lists for line in lines}
    homes = packages_distributions()
    problems = []
    for edge in dict.fromkeys(edges()):
        top = edge.target.split(".")[0]
        if top == LAZY or top in sys.stdlib_module_names:
            continue
        if not declared & {_normal(name) for name in homes.get(top, [top])}:
            problems.append(f"{edge}, which pyproject.toml does not name")
    fail_if(problems, "add it to dependencies or to an extra, with the reason in docs/why/dependencies.md")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("import veneer", id="import"),
        pytest.param(
            "import sys; sys.argv = ['veneer', '--help']; from veneer.cli.main import main; main()", id="help"
        ),
    ],
)
def test_start_up_is_light(command: str) -> None:
    """Loaded modules are counted, not milliseconds: a busy machine must not fail a test."""
    heavy = "torch transformers tokenizers numpy gguf jinja2 fastapi sqlalchemy matplotlib yaml pydantic.main"
    script = (
        f"try:\n    exec({command!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"import sys\nfound = [m for m in {heavy!r}.split() if m in sys.modules]\n"
        "sys.exit(f'start-up imports {found}' if found else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{result.stderr}\nimport these inside the functions that use them"
