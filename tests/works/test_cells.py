"""Every cell of the table of what works that takes no training: the thing itself, or the refusal's text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.works import table
from tests.works.settings import (
    DTYPES,
    IDS,
    Setting,
    assert_same,
    mixed_logits,
    module_checkpoint,
    module_logits,
    native_checkpoint,
    native_logits,
    quiet_peft,
)
from tests.works.table import Cell
from veneer.adapter import Adapter
from veneer.engine import Engine, Request
from veneer.errors import VeneerError
from veneer.inject import attach, create
from veneer.merge import merge
from veneer.methods import METHODS, lower, parse
from veneer.models.load import load_base

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("works")
    return Setting(native_checkpoint(folder / "native"), module_checkpoint(folder / "module"))


def reload(setting: Setting, cell: Cell, folder: Path) -> None:
    adapter = setting.adapter(cell)
    expected = setting.logits(cell, adapter)
    adapter.save(folder)
    assert torch.equal(setting.logits(cell, Adapter.load(folder)), expected)
    assert not torch.equal(expected, setting.logits(cell, None))


def both_ways(setting: Setting, cell: Cell, folder: Path) -> None:
    adapter, bare = setting.adapter(cell), setting.logits(cell, None)
    ours = setting.logits(cell, adapter)
    adapter.save(folder / "ours")
    skip = adapter.parts[0].tensors["rows"].shape[0] if adapter.spec.kind == "prompt" else 0
    skip = 3 if cell.kind == "ptuning" else skip
    with quiet_peft() as peft:
        model = peft.PeftModel.from_pretrained(setting.model(cell), folder / "ours").eval()
        theirs = module_logits(model, skip)
        assert_same(cell, ours, theirs, bare)
        model.save_pretrained(folder / "theirs")
    assert_same(cell, setting.logits(cell, Adapter.load(folder / "theirs")), theirs, bare)


def merging(setting: Setting, cell: Cell, folder: Path) -> None:
    adapter = setting.adapter(cell)
    wanted = setting.logits(cell, adapter)
    if cell.way == "native":
        merge(setting.base(cell.weights), adapter, folder / "merged")
        found = native_logits(load_base(folder / "merged", DTYPES[cell.weights]), None)
    else:
        source = setting.checkpoint(cell)
        if cell.weights == "NF4":
            source = folder / "quantised"
            setting.model(cell).save_pretrained(source)
        merge(source, adapter, folder / "merged")
        from transformers import AutoModelForCausalLM

        options = {"dtype": DTYPES[cell.weights], "attn_implementation": "eager"}
        found = module_logits(AutoModelForCausalLM.from_pretrained(folder / "merged", **options).eval())
    assert_same(cell, found, wanted, setting.logits(cell, None))


def mixed(setting: Setting, cell: Cell, folder: Path) -> None:
    if cell.way == "module":
        model = setting.model(cell)
        attach(model, setting.adapter(cell))
        attach(model, setting.adapter(cell))
        return
    base, adapter = setting.base(cell.weights), setting.adapter(cell)
    other = create(base, parse({"kind": "lora", "rank": 2}), torch.Generator().manual_seed(7))
    other = other.map_tensors(lambda t: t + 0.2)
    lowered = [lower(adapter, base), lower(other, base)]
    together = mixed_logits(base, lowered, [0, 1, -1])
    bare = mixed_logits(base, [], [-1, -1, -1])
    for row, index in enumerate((0, 1)):
        alone = mixed_logits(base, [lowered[index]], [0, 0, 0])
        assert_same(cell, together[row], alone[row], bare[row])
    assert (together[2] - bare[2]).norm() < 0.02 * bare[2].norm()
    _served(base, {"this": adapter, "other": other})


def _served(base: object, adapters: dict[str, Adapter]) -> None:
    """The engine takes them too, and each request says in the mix what it says alone."""
    engine = Engine(base, kv_bytes=1 << 22, adapter_bytes=1 << 24)  # type: ignore[arg-type]
    try:
        for name, adapter in adapters.items():
            engine.add(name, adapter)
        prompts = [tuple(row) for row in IDS.tolist()]
        requests = [Request(p, adapter=a, max_tokens=1) for p, a in zip(prompts, (*adapters, None), strict=True)]
        together = [choices[0].tokens for choices in engine.complete(requests)]
        alone = [engine.complete([request])[0][0].tokens for request in requests]
        assert together == alone
    finally:
        engine.close()


TRIED: dict[table.Question, Callable[[Setting, Cell, Path], None]] = {
    "reload": reload,
    "peft": both_ways,
    "merge": merging,
    "mixed": mixed,
}
CELLS = [cell for cell in table.cells() if not cell.is_slow]


def training(setting: Setting, cell: Cell, folder: Path) -> None:
    """Only for those that cannot begin: the others are in the slow tier."""
    attach(setting.model(cell), setting.adapter(cell))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, setting: Setting, tmp_path: Path) -> None:
    tried = TRIED.get(cell.question, training)
    if cell.refusal is None:
        tried(setting, cell, tmp_path)
        return
    expected = ValueError if cell.refusal == table.NO_PEFT else VeneerError
    with pytest.raises(expected, match=re.escape(cell.refusal)) as caught:
        tried(setting, cell, tmp_path)
    if isinstance(caught.value, VeneerError):
        assert caught.value.help, "a refusal says what to do instead"


def test_every_method_is_in_the_table() -> None:
    found = list(table.cells())
    assert {cell.kind for cell in found} == set(METHODS)
    assert len(found) == len(METHODS) * len(table.WAYS) * len(table.WEIGHTS) * len(table.QUESTIONS)
    assert len(set(map(str, found))) == len(found)
