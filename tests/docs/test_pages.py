"""Every command and every line of Python on a page is run as it stands.

How a page is read:

    ```bash                     run with `bash -euo pipefail`
    ```python                   run; names stay defined for the page's later blocks
    ```text output              what the block before prints, to the letter
    ```bash background          the same, but it stays: started, left running for the blocks after it, ended with the page
    ```bash no-run: REASON      shown, not run

Blocks of one page run in order, in one empty folder. A page with `<!-- slow -->` on its first line is for the slow tier.
Fences without a language, or with another one, are pictures.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fence: its language, what stands behind the language, its text and its first line's number."""

    language: str
    flag: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.flag.startswith("no-run")


def blocks(text: str) -> list[Block]:
    return [Block(m[1], m[2].strip(), m[3], text[: m.start(3)].count("\n") + 1) for m in FENCE.finditer(text)]


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def with_blocks() -> list[object]:
    found: list[object] = []
    for page in pages():
        text = page.read_text()
        if any(block.runs for block in blocks(text)):
            marks = [pytest.mark.slow] if text.startswith("<!-- slow -->") else []
            found.append(pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks))
    return found


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(block: Block) -> list[str]:
    return ["bash", "-euo", "pipefail", "-c", block.text]


@contextlib.contextmanager
def staying(block: Block) -> Iterator[None]:
    """A block that runs until the page ends; then its whole process group gets SIGTERM."""
    with open("background.log", "ab") as log:
        process = subprocess.Popen(
            command(block), env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
        assert process.poll() is None, f"ended by itself:\n{Path('background.log').read_text()}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_block(block: Block, names: dict[str, object], where: str) -> str:
    """Run one block in the current folder and return what it printed."""
    if block.language == "python":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.text, where, "exec"), names)
        return printed.getvalue()
    done = subprocess.run(
        command(block), capture_output=True, text=True, env=environment(), timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{where}:{block.line} exits with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", with_blocks())
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(page.relative_to(ROOT))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    with contextlib.ExitStack() as background:
        for block in blocks(page.read_text()):
            if block.runs and block.flag == "background":
                background.enter_context(staying(block))
            elif block.runs:
                printed = run_block(block, names, where)
            elif (block.language, block.flag) == ("text", "output"):
                assert _plain(printed) == _plain(block.text), f"{where}:{block.line} shows another output"


def test_what_is_not_run_says_why() -> None:
    for page in pages():
        for block in blocks(page.read_text()):
            known = block.flag in ("", "background") or re.fullmatch(r"no-run: \S.*", block.flag)
            assert known or block.language not in ("bash", "python"), (
                f"{page.name}:{block.line}: write `no-run: REASON`"
            )


def test_the_reader_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "a\n```bash\necho 1\n```\n```text output\n1\n```\n```python no-run: later\nx\n```\n```yaml\na: 1\n```\n"
    found = blocks(text)
    assert [(b.language, b.flag, b.runs, b.line) for b in found] == [
        ("bash", "", True, 3),
        ("text", "output", False, 6),
        ("python", "no-run: later", False, 9),
        ("yaml", "", False, 12),
    ]
    with staying(Block("bash", "background", "sleep 60", 1)):
        assert run_block(found[0], {}, "x") == "1\n"
    with pytest.raises(AssertionError, match="ended by itself"), staying(Block("bash", "background", "true", 1)):
        time.sleep(0.5)
    names: dict[str, object] = {}
    assert run_block(Block("python", "", "y = 1\nprint(y)\n", 1), names, "x") == "1\n" and names["y"] == 1


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
