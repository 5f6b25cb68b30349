"""`veneer VERB ...`: finds the verbs, runs one, and turns errors into messages and exit codes.

To add a verb, add a file `cli/VERB.py`; nothing else knows its name:

    \"\"\"One line that `veneer --help` shows. Further paragraphs and an indented example follow in `veneer VERB --help`.\"\"\"

    def command(path: Annotated[Path, typer.Argument(help="...")], as_json: Json = False) -> None:
        from veneer.train import train   # torch and everything that imports it: inside the function, never at the top
        ...                              # raise a class of errors.py to fail; print through _output

A verb with verbs of its own defines `app = typer.Typer()` in place of `command`. Options that several verbs share are in
`_options.py`. With `--json` a verb prints one JSON document and nothing else on standard output; a failed one prints
`{"error": {...}}` there. Exit codes: 0 done, 1 failed, 2 wrong usage. Progress and messages go to standard error.

The surprise: only the verb that is called is imported. The others are placeholders with the first line of their file as help,
so `veneer --help` reads fifteen first lines and imports no torch.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from veneer import __version__
from veneer.errors import VeneerError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    gc.freeze()  # or the collector looks through all that torch has defined before the process may end: half a second
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Errors become messages; `--debug`, anywhere, shows the traceback."""
    arguments = list(arguments)
    mine = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug, as_json = "--debug" in mine, "--json" in mine
    if debug:
        arguments.remove("--debug")
    verb = next((word for word in arguments if not word.startswith("-")), None)
    try:
        assemble(verb)(arguments, prog_name="veneer")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except VeneerError as error:
        return _failed(error, error.message, error.help, error.exit_code, debug, as_json)
    except OSError as error:
        where = f": '{error.filename}'" if error.filename else ""
        return _failed(error, f"{error.strerror or error}{where}", _next_step(error), 1, debug, as_json)
    except Exception as error:  # the last line of defence: a bug of ours should still end in one readable line
        help = "this is a defect in veneer; the same command with --debug shows where"
        return _failed(error, f"{type(error).__name__}: {error}", help, 1, debug, as_json)
    return 0


def _next_step(error: OSError) -> str:
    """What to do about an error of the system that no part of veneer foresaw."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or choose another disk, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check the permissions, or choose a folder you may write to"
    return "check the path; the same command with --debug shows what was being done"


def verbs() -> dict[str, str]:
    """Every verb and its one line, read from the first line of its file without importing it."""
    folder = Path(__file__).parent
    names = sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))
    return {name.replace("_", "-"): _first_line(folder / f"{name}.py") for name in names if name != "main"}


def assemble(verb: str | None) -> typer.Typer:
    """The whole command line, with the module of `verb` imported and placeholders for the rest."""
    app = typer.Typer(
        name="veneer",
        help="Train, prove, keep, combine and serve many small adapters over one frozen base model.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings=SETTINGS,
        epilog="Every verb takes --help, with an example, and --json for machines. Exit codes: 0 ok, 1 failed, 2 usage.",
    )
    app.callback()(_root)
    for name, line in verbs().items():
        if name == verb:
            _add(app, name)
        else:
            app.command(name, help=line, short_help=line)(_placeholder)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of `veneer` itself. Both act before this is called: `--version` eagerly, `--debug` in `run`."""


def _placeholder() -> None:
    raise AssertionError("a verb is imported before it is called")


def _add(app: typer.Typer, name: str) -> None:
    module = importlib.import_module(f"veneer.cli.{name.replace('-', '_')}")
    text = _as_help(module.__doc__ or "")
    entry: Callable[..., None] | typer.Typer = vars(module).get("app") or module.command
    if isinstance(entry, typer.Typer):
        app.add_typer(entry, name=name, help=text, context_settings=SETTINGS)
    else:
        app.command(name, help=text, context_settings=SETTINGS)(entry)


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip().removeprefix('"""').removesuffix('"""')
    return line.rstrip()


def _as_help(text: str) -> str:
    """A docstring with its indented paragraphs marked to be left as they are."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(f"\b\n{p}" if p.startswith("    ") else p for p in paragraphs)


def _failed(error: Exception, message: str, help: str | None, code: int, debug: bool, as_json: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if as_json:
        typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": message, "help": help}}))
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)
    if help is not None:
        typer.echo(f"{typer.style('help:', fg='cyan', bold=True)} {help}", err=True)
    return code
