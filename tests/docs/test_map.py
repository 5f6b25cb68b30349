"""The map, the glossary and the links: pages that name files are only useful while the files are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "veneer"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)|!\[[^\]]*\]\(([^)\s]+)\)")


def test_every_path_on_the_map_exists() -> None:
    named = re.findall(r"`([\w/.]+(?:\.py|/))`", (ROOT / "docs" / "map.md").read_text())
    missing = [path for path in named if path != "src/veneer/" and not (SOURCE / path).exists()]
    assert not missing, f"docs/map.md names what is not there: {', '.join(missing)}"


def test_every_package_is_on_the_map() -> None:
    text = (ROOT / "docs" / "map.md").read_text().split("## Concepts")[0]
    packages = {p.parent.name for p in SOURCE.glob("*/*.py")}
    missing = sorted(name for name in packages if f"`{name}/`" not in text)
    assert not missing, f"give {', '.join(missing)} a row in docs/map.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [a or b for a, b in LINK.findall(page.read_text())]
    inner = [t for t in targets if not t.startswith(("http://", "https://", "mailto:"))]
    broken = [t for t in inner if not (page.parent / t).exists()]
    assert not broken, f"{page.relative_to(ROOT)} links to {', '.join(broken)}"


def test_every_decision_is_listed() -> None:
    listed = set(re.findall(r"\(([\w-]+\.md)\)", (ROOT / "docs" / "why" / "README.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs" / "why").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "why").glob("[!R]*.md")), ids=lambda page: page.stem)
def test_a_decision_has_its_four_parts(page: Path) -> None:
    text = page.read_text()
    missing = [part for part in ("Context", "Choice", "Rejected", "How we will know") if f"**{part}.**" not in text]
    assert not missing, f"{page.name} lacks {', '.join(missing)}"


def test_the_glossary_is_sorted_and_says_each_word_once() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert words == sorted(words, key=str.lower)
    assert len(words) == len(set(words))


def test_every_module_says_what_it_is() -> None:
    silent = [str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if not p.read_text().startswith('"""')]
    assert not silent, f"give a module docstring to {', '.join(silent)}"
