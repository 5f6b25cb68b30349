"""Adapters and numbers as they are written on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.cli._options import AdapterPath, adapter_path, load_adapters
from veneer.cli._output import bytes_text, count_text, say_table
from veneer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapters/legal", AdapterPath("legal", Path("adapters/legal"))),
        ("adapters/legal@0.5", AdapterPath("legal", Path("adapters/legal"), 0.5)),
        ("a=adapters/legal", AdapterPath("a", Path("adapters/legal"))),
        ("a=adapters/legal@-1e-2", AdapterPath("a", Path("adapters/legal"), -0.01)),
        ("runs/legal/adapter", AdapterPath("legal", Path("runs/legal/adapter"))),
        ("runs/legal/last@2", AdapterPath("legal", Path("runs/legal/last"), 2.0)),
    ],
)
def test_adapter_path(text: str, expected: AdapterPath) -> None:
    assert adapter_path(text) == expected


def test_a_folder_with_strange_letters_in_its_name_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x=y@2").mkdir()
    assert adapter_path("x=y@2") == AdapterPath("x=y@2", Path("x=y@2"))


@pytest.mark.parametrize("text", ["", "legal@half"])
def test_what_is_not_an_adapter(text: str) -> None:
    with pytest.raises(ConfigError, match=r"help: write"):
        adapter_path(text)


def test_all_problems_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_adapters([str(tmp_path / "a"), f"a={tmp_path / 'b'}", str(tmp_path / "c")])
    message = caught.value.message
    assert "two adapters are called 'a'" in message and "b'" in message and "c'" in message


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (1e9, "1.00 GB"),
        (2.5e13, "25.0 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_counts() -> None:
    assert [count_text(n) for n in (7, 1_234, 39_976_960, 6_738_415_616)] == ["7", "1.234 k", "39.98 M", "6.738 B"]


def test_a_table_in_a_pipe_keeps_its_lines_whole(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("name", "size"), [("x" * 120, "12"), ("[bold]y[/bold]", "3")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[-2:] == [["x" * 120, "12"], ["[bold]y[/bold]", "3"]]
