"""Loading: sources, the converted cache under trouble (races, kills, damage, no room), and what is refused in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models import tiny
from veneer.base.formats import load_all as load_formats
from veneer.errors import ConfigError, FormatError, NotFound, ResourceError, Unsupported, VeneerError
from veneer.files import cache_folder
from veneer.models import cache, convert, mapped, sources
from veneer.models.base import bound
from veneer.models.catalog import CATALOG, Entry, find
from veneer.models.dtype import bfloat16_is_faster
from veneer.models.load import load_base

IDS = torch.tensor([[5, 17, 40, 3], [9, 8, 7, 6]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.checkpoint("llama", tmp_path / "tiny")


def refused(kind: type[VeneerError], *words: str, **arguments: Any) -> VeneerError:
    with pytest.raises(kind) as caught:
        load_base(**arguments)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.help
    return caught.value


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_folder_becomes_the_model_that_transformers_loads(name: str, shards: str, tmp_path: Path) -> None:
    tiny.checkpoint(name, tmp_path / "model", shard_size=shards)
    assert (tmp_path / "model" / sources.INDEX).exists() == (shards == "20KB")
    base, model = load_base(tmp_path / "model", dtype="float32"), tiny.hf_model(name)
    with torch.no_grad():
        wanted = model(IDS).logits
        assert (base.logits(IDS) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert base.name == "model" and base.tokenizer is None
    assert base.num_parameters == sum(p.numel() for p in model.parameters())
    assert base.nbytes == 4 * base.num_parameters


def test_names_without_the_model_prefix_and_old_buffers_are_understood(tmp_path: Path) -> None:
    """The gpt2 of the hub says `h.0.ln_1.weight` and carries its causal mask."""
    folder = tiny.checkpoint("gpt2", tmp_path / "m")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    wanted = load_base(folder, dtype="float32").logits(IDS)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_base(folder, dtype="float32").logits(IDS), wanted)


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    wanted = load_base(folder, dtype="float32").logits(IDS)
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert torch.equal(load_base(folder, dtype="float32").logits(IDS), wanted)


def test_a_head_under_its_old_name_is_kept_though_the_config_ties_it(tmp_path: Path) -> None:
    folder = tiny.checkpoint("gpt_neox", tmp_path / "m")
    wanted = load_base(folder, dtype="float32").logits(IDS)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight") if "lm_head.weight" in tensors else tensors.pop("embed_out.weight")
    save_file(tensors | {"embed_out.weight": head}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert torch.equal(load_base(folder, dtype="float32").logits(IDS), wanted)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    refused(FormatError, "norm.weight", "are both model.norm.weight", name=folder)


def test_shards_beside_a_whole_file_are_not_read(tmp_path: Path) -> None:
    """As in transformers: they are left over from before."""
    folder = tiny.checkpoint("llama", tmp_path / "m", seed=1)
    wanted = load_base(folder, dtype="float32").logits(IDS)
    for file in tiny.checkpoint("llama", tmp_path / "old", seed=2, shard_size="20KB").iterdir():
        if file.name.startswith("model"):
            shutil.copy(file, folder)
    assert (folder / "model.safetensors.index.json").exists()
    assert torch.equal(load_base(folder, dtype="float32").logits(IDS), wanted)


def test_dtypes_are_separate_files_of_one_base(folder: Path) -> None:
    full, half = load_base(folder, dtype="float32"), load_base(folder, dtype="bfloat16")
    assert full.folder == half.folder and full.identity == half.identity
    target = "model.layers.1.mlp.down_proj"
    assert full.samples(target) == half.samples(target)
    assert torch.equal(half.host(target).weight(), full.host(target).weight().bfloat16())
    assert load_base(folder).dtype == (torch.bfloat16 if bfloat16_is_faster() else torch.float32)


def test_the_converted_file_is_mapped_and_aligned_and_never_written(folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    assert base.folder is not None
    weights = base.folder / "weights.float32.safetensors"
    before = weights.read_bytes()
    tensors = mapped.read(weights)
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 1
    assert all(t.data_ptr() % mapped.ALIGN == 0 for t in tensors.values())
    with safe_open(str(weights), framework="pt") as file:
        assert {n for n in file.keys() if not n.startswith(mapped.PADDING)} == set(tensors)  # noqa: SIM118
        assert torch.equal(file.get_tensor("layers.0.qkv"), tensors["layers.0.qkv"])
    base.host("lm_head").weight().zero_()
    assert weights.read_bytes() == before


def test_later_loads_do_not_read_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base(folder, dtype="float32")

    def never(*_: object) -> None:
        raise AssertionError("the source was opened again")

    monkeypatch.setattr(convert, "open_source", never)
    monkeypatch.setattr(cache, "digest_of", never)
    load_base(folder, dtype="float32")


@pytest.mark.parametrize("quantize", sorted(load_formats()))
def test_quantised_projections_give_nearly_the_same_scores(folder: Path, quantize: str) -> None:
    full, small = load_base(folder, dtype="float32"), load_base(folder, dtype="float32", quantize=quantize)
    wanted, found = full.logits(IDS), small.logits(IDS)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.4
    assert small.identity == full.identity and small.nbytes < 0.6 * full.nbytes
    path = "model.layers.0.self_attn.v_proj"
    assert small.host(path).shape == full.host(path).shape
    packed = small.host(path).weight()
    assert 0 < (packed - full.host(path).weight()).abs().max() < 0.2


def test_bound_adapters_are_seen_in_their_own_context_only(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from veneer.inject import create
    from veneer.methods import lower
    from veneer.methods.lora import LoRA

    base = load_base(folder, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    adapter = create(base, LoRA(rank=2), generator).map_tensors(lambda t: torch.randn(t.shape, generator=generator))
    bank = base.bank([lower(adapter, base)])
    plain = base.logits(IDS)
    with bound(base, bank, 0), ThreadPoolExecutor(1) as pool:
        assert not torch.allclose(base.logits(IDS), plain)
        assert torch.equal(pool.submit(base.logits, IDS).result(), plain)
        with bound(base, bank, -1):
            assert torch.equal(base.logits(IDS), plain)
    assert torch.equal(base.logits(IDS), plain)


# -- trouble with the cache ----------------------------------------------------------------------------------------------

LOADING = (
    "import sys; from veneer.models.load import load_base; print(load_base(sys.argv[1], dtype='float32').identity)"
)
SLOW = """
import sys, time
from veneer.models import mapped
write = mapped.write
def slow(path, entries, tensors):
    def one_by_one():
        for index, item in enumerate(tensors):
            if index == 3:
                open(sys.argv[2], "w").close()
                time.sleep(60)
            yield item
    return write(path, entries, one_by_one())
mapped.write = slow
from veneer.models.load import load_base
load_base(sys.argv[1], dtype="float32")
"""


def test_two_processes_at_once_convert_once_and_agree(folder: Path, own_cache: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", LOADING, str(folder)], stdout=subprocess.PIPE) for _ in range(2)]
    said = {process.communicate(timeout=100)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert said == {f"{load_base(folder, dtype='float32').identity}\n".encode()}
    assert len(list((own_cache / "bases").iterdir())) == 1


def test_a_process_killed_half_way_leaves_nothing_that_counts(folder: Path, own_cache: Path, tmp_path: Path) -> None:
    flag = tmp_path / "writing"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(flag)])
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list((own_cache / "bases").iterdir())
    assert left and all(path.name.startswith(".") for path in left)
    load_base(folder, dtype="float32").logits(IDS)
    assert not [path for path in (own_cache / "bases").iterdir() if path.name.startswith(".")]


def test_damage_to_the_converted_file_is_noticed(folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    assert base.folder is not None
    weights = base.folder / "weights.float32.safetensors"
    whole = bytearray(weights.read_bytes())

    whole[len(whole) // 2] ^= 1
    weights.write_bytes(whole)
    refused(FormatError, "were damaged", name=folder, dtype="float32")
    weights.write_bytes(whole[:-64])
    refused(FormatError, "were damaged", "delete", name=folder, dtype="float32")
    whole[len(whole) // 2] ^= 1
    weights.write_bytes(whole)
    assert load_base(folder, dtype="float32").identity == base.identity


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", b"\xff" * 64, (2).to_bytes(8, "little") + b"{}" + b"0" * 8, (4).to_bytes(8, "little") + b"{not"],
)
def test_a_damaged_container_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(FormatError, match="is damaged"):
        mapped.read(tmp_path / "w")


@pytest.mark.parametrize(
    ("code", "word"), [(errno.EACCES, "cannot write"), (errno.EROFS, "cannot write"), (errno.ENOSPC, "full")]
)
def test_an_unwritable_or_full_cache_is_said(
    code: int, word: str, folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(mapped, "write", fail)
    refused(ResourceError, word, "VENEER_CACHE", name=folder, dtype="float32")
    assert not list((own_cache / "bases").iterdir())


def test_a_cache_that_can_only_be_read_serves_what_it_holds(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(folder, dtype="float32")
    shutil.rmtree(own_cache / "sources")

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    assert load_base(folder, dtype="float32").identity == base.identity


def test_a_cache_folder_that_is_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    refused(ResourceError, "cannot write to the cache folder", "Not a directory", name=folder, dtype="float32")


def test_another_file_beside_the_weights_is_left_alone(folder: Path) -> None:
    wanted = load_base(folder, dtype="float32")
    save_file({"w": torch.ones(2)}, folder / "consolidated.safetensors")
    assert load_base(folder, dtype="float32").folder == wanted.folder


def test_no_room_is_said_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.checkpoint("llama", tmp_path / "tiny", seed=4711)  # weights that no other test has converted
    monkeypatch.setattr(convert, "available_bytes", lambda: 1000)
    refused(ResourceError, "GB of memory", "free", name=folder, dtype="float32")
    monkeypatch.undo()
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    refused(ResourceError, "the disk of", name=folder, dtype="float32")


def test_the_checkpoint_may_change(folder: Path) -> None:
    first = load_base(folder, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    assert load_base(folder, dtype="float32").identity != first.identity


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_everything_wrong_with_the_tensors_is_listed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:5].clone()
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    words = (
        "model.layers.0.mlp.up_proj.weight has shape [5, 48], config.json says [80, 48]",
        "model.layers.9.mlp.up_proj.weight [2, 2] is not part of a llama model",
        "model.layers.1.self_attn.k_proj.weight [24, 48] is missing",
        "model.norm.weight [48] is missing",
    )
    refused(FormatError, *words, name=folder)


def test_values_that_are_not_finite_are_named(folder: Path, own_cache: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.2.mlp.up_proj.weight"][0, :2] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    refused(FormatError, "model.norm.weight has 1", "layers.2.mlp.up_proj.weight has 2", name=folder)
    assert not list((own_cache / "bases").iterdir())


def test_folders_that_are_not_checkpoints(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(FormatError, "no config.json", name=tmp_path / "empty")
    refused(FormatError, "neither a folder nor a .gguf", name=folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(FormatError, "pickle", "pytorch_model.bin", name=folder)
    (folder / "pytorch_model.bin").unlink()
    refused(FormatError, "no .safetensors", name=folder)
    (folder / sources.INDEX).write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    refused(FormatError, "part-1.safetensors", name=folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "mamba"}))
    refused(Unsupported, "model type 'mamba'", "veneer.attach", name=folder)
    (folder / "config.json").write_text("{half")
    refused(FormatError, "not readable JSON", name=folder)


def test_a_cut_or_quantised_checkpoint(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    refused(FormatError, "is damaged", name=folder)
    (folder / "model.safetensors").write_bytes(whole)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    refused(Unsupported, "model.norm.weight is F8_E4M3", name=folder)


def test_names_that_mean_nothing() -> None:
    refused(NotFound, "smollm2-13m", "did you mean 'smollm2-135m'?", name="smollm2-13m")
    refused(NotFound, "no base is called", name="/nowhere/model.gguf")
    refused(ConfigError, "bfloat16", name="smollm2-135m", dtype="bloat16")
    refused(ConfigError, "nf4", name="smollm2-135m", quantize="nf3")


def test_a_hub_id_without_a_network() -> None:
    refused(NotFound, "someone/some-model", "could not be fetched", "network", name="someone/some-model")


def test_a_hub_id_is_a_folder_that_the_hub_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert "model*.safetensors" in allow_patterns and not any("bin" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    wanted = load_base(folder, dtype="float32").identity
    assert load_base("owner/name@v1", dtype="float32").identity == wanted
    load_base("owner/name", dtype="float32")
    assert asked == [("owner/name", "v1"), ("owner/name", None)]


def test_a_catalogue_file_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    monkeypatch.setattr("veneer.models.sources.find", lambda _: tmp_path / "fake.gguf")
    refused(FormatError, "expected b179c9523d0e", name="smollm2-135m")


def test_a_model_in_pieces_is_put_together_once(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (1, 2):
        package = tmp_path / "site" / f"piece{n}-1.0.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: piece{n}\nVersion: 1.0\n")
        (tmp_path / "site" / f"part{n}.bin").write_bytes(bytes([n]) * 5)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    entry = Entry((("piece1", "1.0", "part1.bin"), ("piece2", "1.0", "part2.bin")), "0" * 64, "1M", "MIT", "two pieces")
    monkeypatch.setitem(CATALOG, "pieces", entry)  # type: ignore[arg-type]
    whole = find("pieces")
    assert whole.read_bytes() == b"\x01" * 5 + b"\x02" * 5 and whole.is_relative_to(own_cache)
    monkeypatch.setitem(CATALOG, "absent", Entry((("piece3", "1.0", "x"),), "0" * 64, "1M", "MIT", ""))  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="bases pull absent"):
        find("absent")


def test_hosts_and_ids_that_are_not_there(folder: Path) -> None:
    base = load_base(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        base.host("model.layers.0.mlp.up_prj")
    with pytest.raises(ConfigError, match="the vocabulary has 97"):
        base.logits([[1, 97]])
    with pytest.raises(ConfigError, match="expected integers"):
        base.logits(torch.zeros(3))
    with pytest.raises(Unsupported, match="no tokenizer"):
        base.require_tokenizer()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VENEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "veneer"
    monkeypatch.setenv("HOME", str(tmp_path))
    for nowhere in ("", "relative/folder"):  # as the XDG specification has it
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        assert cache_folder() == tmp_path / ".cache" / "veneer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "veneer"


@pytest.mark.slow
def test_a_start_is_quick_to_map_and_takes_the_memory_of_the_weights() -> None:
    """Peak resident memory of load and one forward, less torch itself, stays within 1.2 of the weights."""
    load_base("smollm2-135m", dtype="float32")
    script = (
        "import os, psutil, torch\n"
        "from veneer.models.load import load_base\n"
        "me = psutil.Process()\n"
        "torch.ones(64, 64) @ torch.ones(64, 64)\n"
        "before = me.memory_info().rss\n"
        "base = load_base('smollm2-135m', dtype='float32')\n"
        "sum(float(t.sum()) for t in base.decoder.tensors.values())\n"
        "print((me.memory_info().rss - before) / base.nbytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert float(done.stdout) <= 1.2
