"""Writes docs/reference/ from the code: methods, what works, inits, rules, run-file keys, command-line help, the list of modules.

`make docs` runs it; `tests/docs/test_reference.py` fails when a page and the code have grown apart.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "reference"
NOTE = "<!-- written by `make docs`; change the code, not this page -->\n\n"


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    makers: dict[str, Callable[[], str]] = {
        "methods.md": methods,
        "what-works.md": what_works,
        "inits.md": inits,
        "optimizers.md": optimizers,
        "base-formats.md": base_formats,
        "rules.md": rules,
        "run-file.md": run_file,
        "cli.md": cli,
        "modules.md": modules,
    }
    return {name: NOTE + make() for name, make in makers.items()}


def methods() -> str:
    from veneer.methods import Method, load_all

    found = load_all()
    text = "# Methods\n\nIn a run file: `method: {kind: KIND, ...}`. In Python: the class, as `vn.LoRA(rank=8)`.\n\n"
    rows = [
        (
            f"[{k}](#{k})",
            m.__name__,
            m.site,
            f"`{m.summary}`",
            _yes(m.merged is not Method.merged),
            _yes(m.peft),
            _paper(m),
        )
        for k, m in sorted(found.items())
    ]
    text += _table(("kind", "class", "site", "in one line", "merges", "in PEFT's files", "paper"), rows)
    text += "\n## When to use which\n\n"
    text += _table(("kind", "when", "limits"), ((f"[{k}](#{k})", m.use, m.limits) for k, m in sorted(found.items())))
    for kind, method in sorted(found.items()):
        text += f"\n## {kind}\n\n{_module_text(method)}\n\n{_fields(method)}"
    return text


def what_works() -> str:
    """The table that `tests/works` tries cell by cell."""
    if str(ROOT) not in sys.path:  # run as a script, the checkout's tests are not importable
        sys.path.append(str(ROOT))
    from tests.works.table import page

    return page()


def inits() -> str:
    from veneer.inits import load_all, needs, paper

    found = load_all()
    rows = [
        (f"`{n}`", _first(inspect.getdoc(f)), ", ".join(sorted(needs(n))) or "-", _arxiv(paper(n)))
        for n, f in sorted(found.items())
    ]
    intro = (
        "# Inits\n\nIn a run file: `method: {kind: lora, init: NAME}`. Which one when: "
        "[choosing](../howto/choose.md#inits).\n\n"
    )
    return intro + _table(("name", "what", "needs from data", "paper"), rows) + _files(found.values())


def optimizers() -> str:
    from veneer.train.optimizers import load_all

    found = load_all()
    rows = [
        (f"`{n}`", _first(inspect.getdoc(o.factory)), ", ".join(o.freezes) or "-", _arxiv(o.paper))
        for n, o in sorted(found.items())
    ]
    intro = (
        "# Optimisers\n\nIn a run file: `train: {optimizer: NAME}`. Which one when: "
        "[choosing](../howto/choose.md#optimisers).\n\n"
    )
    text = intro + _table(("name", "what", "leaves as it starts", "paper"), rows)
    return text + _files(o.factory for o in found.values())


def base_formats() -> str:
    from veneer.base.formats import load_all

    side = 4096
    rows = [
        (f"`{n}`", f.summary, f"{8 * f.nbytes(side, side) / side**2:.3f}", _arxiv(f.paper))
        for n, f in sorted(load_all().items())
    ]
    intro = (
        "# Base formats\n\nIn a run file: `quantize: NAME`; in Python: `vn.load_base(..., quantize=NAME)`. Which one when: "
        "[choosing](../howto/choose.md#base-formats). Embeddings, norms, biases and the head stay in 16 or 32 bits.\n\n"
    )
    return intro + _table(("name", "what", f"bits a weight ({side} x {side})", "paper"), rows)


def rules() -> str:
    from veneer.algebra import load_all, schema

    rows = []
    for name, function in sorted(load_all().items()):
        options = [f"`{key}`{_default(field, ' = ')}" for key, field in schema(name).model_fields.items()]
        rows.append((f"`{name}`", _first(inspect.getdoc(function)), ", ".join(options) or "-"))
    intro = (
        "# Combination rules\n\n`veneer combine --rule NAME a=0.7 b=0.3 --out DIR`, or `rule: NAME` in a recipe.\n\n"
    )
    return intro + _table(("rule", "what", "options"), rows)


def run_file() -> str:
    from veneer.train.config import RunConfig

    intro = "# Run file\n\nOne YAML file is one run. Any value can be changed on the command line: `--set section.key=value`.\n"
    return intro + "".join(_section(RunConfig, ""))


def _section(model: type[BaseModel], path: str) -> Iterator[str]:
    inner = {name: f.annotation for name, f in model.model_fields.items() if _is_model(f.annotation)}
    plain = {name: f for name, f in model.model_fields.items() if name not in inner}
    rows = [(f"`{path}{n}`", _kind(f), _default(f), f.description or "") for n, f in plain.items()]
    title = f"`{path.rstrip('.')}`" if path else "At the top"
    yield f"\n## {title}\n\n" + _table(("key", "type", "default", "what"), rows)
    for name, annotation in inner.items():
        yield from _section(annotation, f"{path}{name}.")


def cli() -> str:
    from veneer.cli.main import verbs

    text = "# Command line\n\n" + _fence(_help([]))
    for verb in verbs():
        shown = _help([verb])
        text += f"\n## {verb}\n\n{_fence(shown)}"
        for name in _subverbs(shown):
            text += f"\n### {verb} {name}\n\n{_fence(_help([verb, name]))}"
    return text


def _help(words: list[str]) -> str:
    from veneer.cli.main import run

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), _columns(100):
        run([*words, "--help"])
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines()).strip()


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    """Help is wrapped to the terminal; a page has a width of its own."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _subverbs(shown: str) -> list[str]:
    _, found, below = shown.partition("\nCommands:\n")
    return re.findall(r"^  (\S+)", below, re.MULTILINE) if found else []


def modules() -> str:
    source = ROOT / "src" / "veneer"
    rows = []
    for path in sorted(source.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((f"`{path.relative_to(source)}`", _first(text)))
    return "# Modules\n\nEvery file below `src/veneer/` and its first sentence.\n\n" + _table(("file", "what"), rows)


def _module_text(thing: type) -> str:
    """The docstring of the module that a class is the reason for."""
    return _paragraphs(sys.modules[thing.__module__])


def _paragraphs(module: ModuleType) -> str:
    """A module's docstring; paragraphs that are set in, or that are a table of words, keep their lines."""
    text = inspect.getdoc(module) or ""
    return "\n\n".join(_fence(p) if p.startswith("    ") or "  " in p.strip() else p for p in text.split("\n\n"))


def _fields(model: type[BaseModel]) -> str:
    rows = [(f"`{n}`", _kind(f), _default(f), f.description or "") for n, f in model.model_fields.items()]
    return _table(("field", "type", "default", "what"), rows)


def _kind(field: FieldInfo) -> str:
    name = inspect.formatannotation(field.annotation)
    return f"`{re.sub(r'(typing|pathlib|collections[.]abc)[.]|<class .|.>', '', name)}`"


def _default(field: FieldInfo, before: str = "") -> str:
    if field.is_required():
        return "" if before else "required"
    value = field.get_default(call_default_factory=True)
    return f"{before}`{value!r}`" if not isinstance(value, BaseModel) else ""


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _paper(method: Any) -> str:
    return _arxiv(method.paper)


def _arxiv(number: str) -> str:
    return f"arXiv {number}" if number else "-"


def _files(functions: Iterable[Any]) -> str:
    """The docstring of every file that one of these functions stands in, under the file's name."""
    names = sorted({function.__module__ for function in functions})
    return "".join(f"\n## {name.rpartition('.')[2]}\n\n{_paragraphs(sys.modules[name])}\n" for name in names)


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _first(text: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def _fence(text: str) -> str:
    return f"```\n{text}\n```\n"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    found = pages()
    for old in OUT.glob("*.md"):
        if old.name not in found:
            old.unlink()
    for name, text in found.items():
        (OUT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
