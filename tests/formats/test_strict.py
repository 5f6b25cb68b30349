"""What is refused: damaged, hostile and contradictory folders, each with everything that is wrong in one error."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.laws.world import World, fresh, host_of, method, stirred, world
from veneer import files, formats
from veneer.adapter import Adapter, Provenance
from veneer.errors import Conflict, FormatError, NotFound, ResourceError
from veneer.formats.checkpoint import open_tensors
from veneer.types import BaseShape

TENSORS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "veneer.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter() -> Adapter:
    made = stirred(fresh(method("lora", targets=["q_proj", "v_proj"]), world()))
    origin = Provenance(
        base="ab" * 32, base_name="tiny", base_samples={"x": (1.0, 0.125)}, data="cd", parents=("e",), extra={"k": [1]}
    )
    return replace(made, provenance=origin)


@pytest.fixture
def saved(adapter: Adapter, tmp_path: Path) -> Path:
    adapter.save(tmp_path / "a")
    return tmp_path / "a"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_everything_comes_back(adapter: Adapter, saved: Path) -> None:
    again = Adapter.load(saved)
    assert again.provenance == adapter.provenance
    assert again.spec == adapter.spec
    assert again.digest == adapter.digest


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([1.0, 0.1], (1.0, 0.1)),
        ("AACAPwAAAD4=", (1.0, 0.125)),
        ("", ()),
        ("AACAPwAA", None),
        ("1.0, 0.1", None),
        (1, None),
    ],
)
def test_samples_of_the_base_are_packed_numbers_or_a_list(
    saved: Path, written: Any, read: tuple[float, ...] | None
) -> None:
    told = json.loads((saved / OURS).read_text())["provenance"]
    edit_json(saved / OURS, provenance={**told, "base_samples": {"x": written}})
    if read is not None:
        assert Adapter.load(saved).provenance.base_samples == {"x": read}
        return
    with pytest.raises(FormatError, match="base_samples"):
        Adapter.load(saved)


def test_all_that_is_wrong_is_in_one_error(saved: Path) -> None:
    (saved / OURS).unlink()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q0}.lora_A.weight"]
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"] = torch.ones(8, 2)
        tensors["base_model.model.model.norm.weight"] = torch.ones(16)
        tensors["something.else"] = torch.ones(1)

    edit_tensors(saved, spoil)
    edit_json(saved / CONFIG, target_modules=["q_proj", "v_proj", "nothing_proj"], layer_replication=[[0, 2]])
    with pytest.raises(FormatError) as caught:
        Adapter.load(saved)
    text = str(caught.value)
    for part in (
        "layers.0.self_attn.q_proj lacks lora_A.weight",
        "'something.else' is not a tensor of lora",
        "model.norm' is saved whole, but modules_to_save does not name it",
        "'nothing_proj', but no tensor is there",
        "layer_replication",
    ):
        assert part in text


def test_whole_embeddings_need_no_name_in_modules_to_save(saved: Path) -> None:
    """PEFT's `save_embedding_layers` writes them so, and writes them of itself where the vocabulary grew."""
    (saved / OURS).unlink()
    names = ("model.embed_tokens", "lm_head")
    edit_tensors(saved, lambda t: t.update({f"base_model.model.{n}.weight": torch.ones(66, 16) for n in names}))
    whole = {p.target: tuple(p.tensors["weight"].shape) for p in Adapter.load(saved).parts if p.kind == "full"}
    assert whole == dict.fromkeys(names, (66, 16))


@pytest.mark.parametrize(
    ("shape", "match"),
    [((8, 2), "expected \\[r, in\\] and \\[out, r\\]"), ((8,), "expected \\[r, in\\] and \\[out, r\\]")],
)
def test_a_mis_shaped_factor(saved: Path, shape: tuple[int, ...], match: str) -> None:
    (saved / OURS).unlink()
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(saved, lambda tensors: tensors.update({key: torch.ones(shape)}))
    with pytest.raises(FormatError, match=match):
        Adapter.load(saved)


def test_a_rank_that_the_config_does_not_say(saved: Path) -> None:
    (saved / OURS).unlink()
    edit_json(saved / CONFIG, r=5)
    with pytest.raises(FormatError, match="has rank 3, the config says 5"):
        Adapter.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(saved: Path, adapter: Adapter, value: float, tmp_path: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors[f"{Q0}.lora_A.weight"].fill_(value))
    with pytest.raises(FormatError, match=f"'{Q0}.lora_A.weight' has 48 values that are not finite"):
        Adapter.load(saved)
    adapter.parts[0].tensors["A"][0, 0] = value
    with pytest.raises(FormatError, match="cannot be kept"):
        adapter.save(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_empty_tensor(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(0, 16)}))
    with pytest.raises(FormatError, match="has no elements"):
        Adapter.load(saved)


@pytest.mark.parametrize("change", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
def test_a_config_edited_beside_ours(saved: Path, change: dict[str, Any]) -> None:
    edit_json(saved / CONFIG, **change)
    with pytest.raises(FormatError, match="the two descriptions of the adapter differ"):
        Adapter.load(saved)
    (saved / OURS).unlink()
    Adapter.load(saved)


def test_weights_edited_beside_ours(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors[f"{Q0}.lora_A.weight"].mul_(2))
    with pytest.raises(FormatError, match="the digest differs"):
        Adapter.load(saved)


def test_a_target_that_went_missing(saved: Path) -> None:
    edit_tensors(saved, lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"])
    with pytest.raises(FormatError, match=r"no tensor is there|is missing"):
        Adapter.load(saved)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"nothing": 3}},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": [1]}},
        {"alpha_pattern": [[0]]},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": 2.5},
        {"target_parameters": True},
        {"trainable_token_indices": {"embed_tokens": 3}},
        {"lora_alpha": -1},
        {"r": "x"},
    ],
)
def test_fields_that_make_no_sense(saved: Path, config: dict[str, Any]) -> None:
    (saved / OURS).unlink()
    edit_json(saved / CONFIG, **config)
    with pytest.raises(FormatError):
        Adapter.load(saved)


@pytest.mark.parametrize("kind", ["LOHA", None, "LORA "])
def test_a_type_that_is_not_here(saved: Path, kind: str | None) -> None:
    (saved / OURS).unlink()
    edit_json(saved / CONFIG, peft_type=kind)
    with pytest.raises(FormatError, match="known: ADALORA, IA3, LORA, "):
        Adapter.load(saved)


def test_a_version_from_the_future(saved: Path) -> None:
    edit_json(saved / OURS, format=2)
    with pytest.raises(FormatError, match="format"):
        Adapter.load(saved)


def raw(header: bytes, data: bytes = b"", *, announced: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if announced is None else announced) + header + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HOSTILE = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header beyond the file": raw(b"{}", announced=2**40),
    "a header of 2^63": raw(b"{}", announced=2**63 + 5),
    "not json": raw(b"{]"),
    "deep json": raw(b"[" * 100_000),
    "a list": raw(b"[]"),
    "not utf-8": raw(b'{"\xff": 1}'),
    "a name twice": raw(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}'),
    "an unknown dtype": raw(entry("F31"), b"1234"),
    "a dtype that is no name": raw(entry([1]), b"1234"),
    "a negative size": raw(entry(shape=(-1,)), b"1234"),
    "a size that overflows": raw(entry(shape=(2**61, 2**61)), b"1234"),
    "a size that is a truth": raw(entry(shape=(True,)), b"1234"),
    "bytes that don't fit the shape": raw(entry(shape=(2,)), b"1234"),
    "beyond the end": raw(entry(offsets=(4, 8)), b"1234"),
    "cut off": raw(entry(), b"12"),
    "bytes left over": raw(entry(), b"12345678"),
    "overlapping": raw(
        json.dumps({n: {"dtype": "U8", "shape": [2], "data_offsets": [i, i + 2]} for i, n in enumerate("ab")}).encode(), b"123"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_tensor_file(name: str, saved: Path) -> None:
    (saved / TENSORS).write_bytes(HOSTILE[name])
    with pytest.raises(FormatError):
        open_tensors(saved / TENSORS)
    with pytest.raises(FormatError):
        Adapter.load(saved)


def test_a_huge_header_is_not_read(saved: Path) -> None:
    with (saved / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)
    with pytest.raises(FormatError, match="announces a header"):
        Adapter.load(saved)


def test_every_cut_is_noticed(saved: Path) -> None:
    whole = (saved / TENSORS).read_bytes()
    for size in range(0, len(whole), 97):
        (saved / TENSORS).write_bytes(whole[:size])
        with pytest.raises(FormatError):
            Adapter.load(saved)


def test_a_pickle_is_never_opened(saved: Path) -> None:
    (saved / TENSORS).unlink()
    torch.save({}, saved / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin, which can run code"):
        Adapter.load(saved)


@pytest.mark.parametrize("name", [TENSORS, CONFIG, OURS])
def test_a_link_that_leads_out(saved: Path, name: str, tmp_path: Path) -> None:
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="a link that leads out of its folder"):
        Adapter.load(saved)


def test_a_hub_cache_may_link_to_its_blobs(saved: Path, adapter: Adapter, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (TENSORS, CONFIG, OURS):
        (saved / name).rename(tmp_path / "hub" / "blobs" / name)
        (snapshot / name).symlink_to(tmp_path / "hub" / "blobs" / name)
    assert Adapter.load(snapshot).digest == adapter.digest


def test_a_pipe_is_not_waited_for(saved: Path) -> None:
    (saved / CONFIG).unlink()
    os.mkfifo(saved / CONFIG)
    with pytest.raises(FormatError, match="not an ordinary file"):
        Adapter.load(saved)


@pytest.mark.parametrize("name", [CONFIG, OURS])
@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": 1, "a": 2}'])
def test_json_that_is_none(saved: Path, name: str, text: str) -> None:
    (saved / name).write_text(text)
    with pytest.raises(FormatError):
        Adapter.load(saved)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(NotFound, match=name):
        Adapter.load(saved)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Adapter.load(tmp_path / "nowhere")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_saving_over_an_adapter_keeps_what_else_is_there(saved: Path, adapter: Adapter) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("mine too")
    adapter.scaled(2.0).save(saved)
    assert Adapter.load(saved).digest == adapter.scaled(2.0).digest
    assert (saved / "README.md").read_text() == "mine" and (saved / "notes" / "a.txt").read_text() == "mine too"
    assert [path.name for path in saved.parent.iterdir()] == ["a"]


def test_a_folder_of_other_things_is_left_alone(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(Conflict, match=r"photo\.jpg"):
        adapter.save(tmp_path)
    assert content(tmp_path) == {"photo.jpg": b"x"}


@pytest.mark.parametrize("step", ["save_file", "fsync", "swap"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_what_was_there(
    step: str, exists: bool, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a"
    if exists:
        adapter.save(place)
    before = content(place) if exists else {}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "save_file":
        monkeypatch.setattr(formats, "save_file", full)
    else:
        monkeypatch.setattr(files, "sync" if step == "fsync" else "_put", full)
    with pytest.raises(ResourceError, match="No space left on device") as caught:
        adapter.scaled(2.0).save(place)
    assert caught.value.help is not None and "free some space" in caught.value.help
    assert (content(place) if exists else {}) == before
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if exists else [])


def test_a_folder_that_may_not_be_written(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(ResourceError, match="Permission denied") as caught:
        adapter.save(tmp_path / "a")
    assert caught.value.help == "choose a folder you may write to"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["save_file", "load", "files._put"])
def test_a_kill_leaves_what_was_there(step: str, adapter: Adapter, saved: Path) -> None:
    before = content(saved)
    script = f"""
import os, signal
from veneer import formats
from veneer.adapter import Adapter
from veneer import files
adapter = Adapter.load({str(saved)!r}).scaled(2.0)
kill = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
{step if step == "files._put" else f"formats.{step}"} = kill
adapter.save({str(saved)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(saved) == before
    adapter.scaled(2.0).save(saved)
    assert Adapter.load(saved).digest == adapter.scaled(2.0).digest


def test_without_an_atomic_exchange_the_old_name_is_taken_in_two_steps(
    adapter: Adapter, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    adapter.scaled(2.0).save(saved)
    assert Adapter.load(saved).digest == adapter.scaled(2.0).digest
    assert [path.name for path in saved.parent.iterdir()] == ["a"]


def test_a_write_that_is_not_what_was_given_never_takes_the_place(
    adapter: Adapter, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(saved)

    def wrong(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(formats, "save_file", wrong)
    with pytest.raises(FormatError, match="the digest differs"):
        adapter.save(saved)
    assert content(saved) == before


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("model.layers", "model._orig_mod.layers"),
        lambda key: key.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
        lambda key: key.removeprefix("base_model.model."),
    ],
    ids=["compiled", "fsdp", "adapter name", "no prefix"],
)
def test_names_of_older_files(rename: Callable[[str], str], saved: Path, adapter: Adapter) -> None:
    (saved / OURS).unlink()
    save_file({rename(name): tensor for name, tensor in load_file(saved / TENSORS).items()}, saved / TENSORS)
    again = Adapter.load(saved)
    assert again.targets == adapter.targets
    for target in adapter.targets:
        assert torch.equal(again.delta(target), adapter.delta(target))


def test_names_that_look_like_ours(tmp_path: Path) -> None:
    """A module called `lora_A.weight`: keys are taken apart from the end, never by searching."""
    start = "base_model.model.lora_A.weight"
    keys = {f"{start}.lora_A.weight": torch.ones(2, 4), f"{start}.lora_B.weight": torch.ones(3, 2)}
    save_file(keys, tmp_path / TENSORS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "lora_A.weight"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    adapter = Adapter.load(tmp_path)
    assert adapter.targets == ("lora_A.weight",)
    assert adapter.scale("lora_A.weight") == 2.0


def test_two_adapters_in_one_file_are_not_mixed(saved: Path) -> None:
    (saved / OURS).unlink()
    edit_tensors(saved, lambda t: t.update({f"{Q0}.lora_A.other.weight": torch.ones(3, 16)}))
    with pytest.raises(FormatError, match="stands for a tensor that is there already"):
        Adapter.load(saved)


def test_short_names_get_a_regular_expression_that_matches_only_them(tmp_path: Path) -> None:
    """PEFT's list would match `block.fc` for `fc` too."""
    hosts = {name: host_of("linear", 8, 8, i) for i, name in enumerate(("fc", "block.fc"))}
    base = World(BaseShape(8, 1, 1, 1, 8, 0, {n: h.shape for n, h in hosts.items()}), hosts)
    fresh(method("lora", targets=["re:fc"]), base).save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "fc"
    assert Adapter.load(tmp_path).targets == ("fc",)
