"""The public face: every name works, is typed, and is not hidden by the folder it lives in."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import veneer

PROMISED = {
    *("load_base", "train", "Adapter", "attached", "attach", "merge", "combine", "Engine", "Request", "Library"),
    *("LoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning", "PTuning", "Bottleneck", "BitFit", "VeRA", "Full"),
}


@pytest.mark.parametrize("name", veneer.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert not isinstance(getattr(veneer, name), ModuleType)
    assert name in dir(veneer)


def test_every_promised_name_is_public() -> None:
    assert set(veneer.__all__) >= PROMISED


def test_editors_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the lazy table say the same."""
    tree = ast.parse(Path(veneer.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {a.asname: f"{n.module}" for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == {name: f"veneer.{home}" for name, home in veneer._HOME.items()}


@pytest.mark.parametrize("name", ["train", "merge"])
def test_importing_the_folder_does_not_hide_the_function(name: str) -> None:
    importlib.import_module(f"veneer.{name}")
    assert callable(getattr(veneer, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="lorra"):
        veneer.lorra  # noqa: B018


@pytest.mark.parametrize("frozen", [False, True], ids=["usual", "a program that froze its objects"])
def test_the_collector_is_left_as_it_was(frozen: bool) -> None:
    """In a process of its own, as the collector is one for all of it."""
    code = f"""
import gc
if {frozen}: gc.freeze()
before = gc.get_freeze_count()
import veneer as vn
vn.LoRA
assert gc.isenabled() and before // 2 <= gc.get_freeze_count() <= before  # some of what was frozen has gone
class Ring: pass
import weakref
ring = Ring(); ring.self = ring; seen = weakref.ref(ring); del ring
gc.disable()
vn.Library
assert not gc.isenabled()
gc.collect()
assert seen() is None, "what is garbage by then is still collected"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
