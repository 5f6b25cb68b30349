"""The command line as a user meets it: help, errors in one line, exit codes, JSON for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from veneer.cli import main as cli
from veneer.errors import ConfigError, DataError

Output = pytest.CaptureFixture[str]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A verb called `toy` that fails in the way it is told."""
    module = ModuleType("veneer.cli.toy", '"""Toy with it."""')

    def command(how: str = "fine") -> None:
        errors = {
            "config": ConfigError("two problems:\n  - a\n  - b", help="write c"),
            "data": DataError("train.jsonl:3 is empty"),
            "disk": OSError(28, "No space left on device", "adapter.safetensors"),
            "bug": KeyError("oops"),
            "stop": KeyboardInterrupt(),
        }
        if how in errors:
            raise errors[how]

    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "veneer.cli.toy", module)
    monkeypatch.setattr(cli, "verbs", lambda: {"toy": "Toy with it."})
    return module


def test_version(capsys: Output) -> None:
    import veneer

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == veneer.__version__


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_verb_with_its_line(flag: str, capsys: Output) -> None:
    assert cli.run([flag]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, line in cli.verbs().items():
        assert f"{name} {line}" in shown


def test_every_verb_says_what_it_does_in_one_line() -> None:
    for name, line in cli.verbs().items():
        assert line.endswith(".") and len(line) <= 120, f"cli/{name}.py: the first line of its docstring is its help"


@pytest.mark.parametrize("verb_name", sorted(cli.verbs()))
def test_every_verb_has_help_with_an_example(verb_name: str, capsys: Output) -> None:
    assert cli.run([verb_name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"veneer {verb_name}" in shown.split("Options:")[0].split("\n", 1)[1], (
        "show an example, indented, in the docstring"
    )
    assert "--json" in shown or "Commands:" in shown


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("fine", 0, ""),
        ("config", 2, "error: two problems:\n  - a\n  - b\nhelp: write c\n"),
        ("data", 1, "error: train.jsonl:3 is empty\n"),
        (
            "disk",
            1,
            "error: No space left on device: 'adapter.safetensors'\n"
            "help: free some space or choose another disk, then run the same command again\n",
        ),
    ],
)
def test_errors_are_messages(verb: ModuleType, how: str, code: int, message: str, capsys: Output) -> None:
    assert cli.run(["toy", "--how", how]) == code
    assert capsys.readouterr() == ("", message)


def test_a_bug_is_one_line_until_asked(verb: ModuleType, capsys: Output) -> None:
    assert cli.run(["toy", "--how", "bug"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: KeyError: 'oops'\nhelp: ") and "Traceback" not in shown
    assert cli.run(["toy", "--how", "bug", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c(verb: ModuleType) -> None:
    assert cli.run(["toy", "--how", "stop"]) == 130


def test_a_failure_is_json_when_json_was_asked(capsys: Output) -> None:
    assert cli.run(["plan", "--params", "many", "--json"]) == 2
    out = capsys.readouterr().out
    assert json.loads(out)["error"]["type"] == "ConfigError"
    assert json.loads(out)["error"]["help"]


@pytest.mark.parametrize("arguments", [["trian"], ["plan", "--no-such-option"], ["plan", "--rank", "0"]])
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: Output) -> None:
    assert cli.run(arguments) == 2
    assert capsys.readouterr().err


def test_a_mistyped_verb_is_recognised(capsys: Output) -> None:
    cli.run(["paln"])
    assert "'plan'" in capsys.readouterr().err


def test_a_new_verb_is_a_file(tmp_path: Path) -> None:
    """Dropping a file into the folder is enough, and only the verb that is called is imported."""
    import shutil

    copy = tmp_path / "veneer"
    shutil.copytree(Path(cli.__file__).parent.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "cli" / "greet.py").write_text(
        '"""Greet someone.\n\n    veneer greet Ada\n"""\n\ndef command(name: str) -> None:\n    print(f"hello {name}")\n'
    )
    (copy / "cli" / "broken.py").write_text('"""Never imported."""\nraise RuntimeError\n')

    def veneer(*arguments: str) -> str:
        script = "from veneer.cli.main import main; main()"
        command = [sys.executable, "-c", script, *arguments]
        environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
        return done.stdout

    assert "Greet someone." in veneer("--help")
    assert veneer("greet", "Ada") == "hello Ada\n"
