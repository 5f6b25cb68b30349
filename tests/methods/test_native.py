"""Every method on the native decoder: against PEFT where PEFT has it, against its definition where it hasn't.

The base is a random Llama with fewer key heads than heads. Both sides read the same files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.formats.tiny import gpt2, llama, stir
from tests.laws.world import stirred
from veneer.adapter import Adapter
from veneer.errors import ConfigError, TargetError, Unsupported
from veneer.inits import InitStats
from veneer.inject.create import create
from veneer.methods import METHODS, parse
from veneer.methods import lower as lower_adapter
from veneer.models.bank import spans_of
from veneer.models.base import Base
from veneer.models.load import load_base
from veneer.types import Segment

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return llama()


@pytest.fixture(scope="module")
def base(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return load_base(folder, dtype="float32")


def logits(base: Base, *adapters: Adapter, ids: Tensor = IDS) -> Tensor:
    """Scores of the batch under the first adapter, or under the bare base."""
    lowered = [lower_adapter(adapter, base) for adapter in adapters]
    bank = base.bank(lowered)
    segments = [Segment(ids.shape[1], row, 0 if adapters else -1) for row in range(ids.shape[0])]
    hidden = base.decoder.forward(ids.reshape(-1), segments, bank)
    return base.decoder.logits(hidden, spans_of(segments), bank).view(*ids.shape, -1)


def fresh(base: Base, **fields: Any) -> Adapter:
    return create(base, parse(fields), torch.Generator().manual_seed(0))


METHOD_FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4}, "dora": {"rank": 4}, "ia3": {}, "vera": {"rank": 8}, "bitfit": {},
    "full": {"targets": ["down_proj", "embed_tokens"]}, "token_rows": {"tokens": [1, 5]},
    "bottleneck": {"style": "houlsby", "size": 4},
    "prompt": {"num_tokens": 3}, "ptuning": {"num_tokens": 3, "encoder": "lstm", "encoder_size": 5},
    "prefix": {"num_tokens": 3, "encoder": 6},
    "lora_xs": {"rank": 4}, "adalora": {"rank": 4, "target_rank": 2}, "shira": {"rank": 2}, "oft": {"block": 8},
}  # fmt: skip


def test_every_method_is_here() -> None:
    assert set(METHOD_FIELDS) == set(METHODS)


@pytest.mark.parametrize("kind", [k for k, m in METHODS.items() if m.site not in ("tokens", "kv")])
def test_a_fresh_adapter_is_the_base_bitwise(kind: str, base: Base) -> None:
    assert torch.equal(logits(base, fresh(base, kind=kind, **METHOD_FIELDS[kind])), logits(base))


@pytest.mark.parametrize("kind", list(METHOD_FIELDS))
def test_a_file_is_the_same_function_and_gradients_reach_every_tensor(kind: str, base: Base, tmp_path: Path) -> None:
    adapter = stirred(fresh(base, kind=kind, **METHOD_FIELDS[kind]))
    expected = logits(base, adapter)
    assert not torch.allclose(expected, logits(base), atol=1e-4)
    adapter.save(tmp_path / "a")
    assert torch.equal(logits(base, Adapter.load(tmp_path / "a")), expected)
    frozen = adapter.spec.frozen()
    leaves: dict[str, Tensor] = {}
    parts = []
    for part in adapter.parts:
        own = {n: t.clone().requires_grad_(n not in frozen) for n, t in part.tensors.items()}
        leaves.update({f"{part.target} {n}": t for n, t in own.items() if t.requires_grad})
        parts.append(replace(part, tensors=own))
    (logits(base, replace(adapter, parts=tuple(parts))).log_softmax(-1)[..., 3]).sum().backward()
    silent = [n for n, t in leaves.items() if t.grad is None or not torch.isfinite(t.grad).all() or not t.grad.any()]
    assert not silent


def peft_cases() -> dict[str, Callable[[Any], Any]]:
    task = {"task_type": "CAUSAL_LM"}
    lora = {"r": 4, "lora_alpha": 6, **task}
    return {
        "lora": lambda p: p.LoraConfig(target_modules="all-linear", **lora),
        "rslora, patterns, whole modules": lambda p: p.LoraConfig(
            target_modules=["q_proj", "down_proj"], use_rslora=True, rank_pattern={"1.self_attn.q_proj": 2},
            modules_to_save=["lm_head", "model.norm", "input_layernorm"], **lora
        ),
        "embedding and tokens": lambda p: p.LoraConfig(target_modules=["v_proj"], trainable_token_indices=[0, 9], **lora),
        "embedding": lambda p: p.LoraConfig(target_modules=["embed_tokens", "o_proj", "lm_head"], **lora),
        "dora": lambda p: p.LoraConfig(target_modules="all-linear", use_dora=True, **lora),
        "alora": lambda p: p.LoraConfig(
            target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=[int(IDS[0, 3]), int(IDS[0, 4])], **lora
        ),
        "ia3": lambda p: p.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **task
        ),
        "vera": lambda p: p.VeraConfig(r=8, target_modules=["q_proj", "up_proj"], **task),
        "lora with a bias of its own": lambda p: p.LoraConfig(target_modules=["q_proj", "up_proj"], lora_bias=True, **lora),
        "vera without its projections": lambda p: p.VeraConfig(
            r=8, target_modules=["q_proj", "up_proj"], save_projection=False, projection_prng_key=7, **task
        ),
        "adalora": lambda p: p.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "down_proj"], **task
        ),
        "shira": lambda p: p.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=3, **task),
        "oft": lambda p: p.OFTConfig(
            oft_block_size=8, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False, **task
        ),
        "oft, the series": lambda p: p.OFTConfig(
            r=2, oft_block_size=0, target_modules=["q_proj", "down_proj"], num_cayley_neumann_terms=6, **task
        ),
        "oft, one block": lambda p: p.OFTConfig(
            oft_block_size=8, block_share=True, target_modules=["q_proj", "down_proj"], **task
        ),
        "prompt": lambda p: p.PromptTuningConfig(num_virtual_tokens=4, **task),
        "p-tuning": lambda p: p.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **task),
        "prefix": lambda p: p.PrefixTuningConfig(num_virtual_tokens=4, **task),
        "trainable tokens": lambda p: p.TrainableTokensConfig(
            token_indices=[1, int(IDS[0, 0])], target_modules=["embed_tokens"], **task
        ),
    }  # fmt: skip


def peft_logits(model: Any, ids: Tensor, skip: int) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(ids, attention_mask=torch.ones_like(ids)).logits[:, skip:]
    return result


@pytest.mark.parity
@pytest.mark.parametrize("name", list(peft_cases()))
def test_the_same_as_peft(name: str, base: Base, theirs: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(theirs), peft_cases()[name](peft))
    stir(model)
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    if name == "alora":
        with pytest.raises(Unsupported, match="position in the text"):
            adapter.spec.forward(torch.ones(1, 32), adapter.parts[0], base.host(adapter.parts[0].target))
        ids = IDS[:1]
        lowered = lower_adapter(adapter, base)
        assert lowered.invocation == tuple(ids[0, 3:5].tolist())
        bank = base.bank([lowered])
        segments = [Segment(3, 0, -1, 0), Segment(6, 0, 0, 3)]
        hidden = base.decoder.forward(ids[0], segments, bank)
        ours = base.decoder.logits(hidden, spans_of(segments), bank)[None]
        assert torch.equal(ours[:, :3], logits(base, ids=ids[:, :3])) or torch.allclose(
            ours[:, :3], logits(base, ids=ids)[:, :3]
        )
    else:
        ids, ours = IDS, logits(base, adapter)
    prompt = 4 if name in ("prompt", "p-tuning") else 0
    torch.testing.assert_close(ours, peft_logits(model, ids, prompt), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(base, ids=ids), atol=1e-3)


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_on_a_tied_head(tied: bool, tmp_path: Path) -> None:
    """The head of a tied base is the embedding: the same rows serve both, as in PEFT."""
    peft = pytest.importorskip("peft")
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", dtype="float32")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=IDS[0, :3].tolist())
    model = peft.get_peft_model(model, config)
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    ours = logits(base, Adapter.load(tmp_path / "adapter"))
    torch.testing.assert_close(ours, peft_logits(model, IDS, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parity
def test_a_whole_embedding_on_a_tied_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kept tied, PEFT stores both; untied, it changes the input side only, which is said at load."""
    peft = pytest.importorskip("peft")
    for tied in (True, False):
        model = llama(tie_word_embeddings=True)
        model.save_pretrained(tmp_path / f"base-{tied}")
        fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(ensure_weight_tying=tied, **fields))
        stir(model)
        model.save_pretrained(tmp_path / f"{tied}")
        caplog.clear()
        adapter = Adapter.load(tmp_path / f"{tied}")
        assert ("PEFT leaves the head alone" in caplog.text) is not tied
        base = load_base(tmp_path / f"base-{tied}", dtype="float32")
        if tied:
            torch.testing.assert_close(logits(base, adapter), peft_logits(model, IDS, 0), rtol=1e-4, atol=1e-4)
            adapter.save(tmp_path / "ours")
            assert Adapter.load(tmp_path / "ours").digest == adapter.digest


@pytest.mark.parity
def test_lora_and_ia3_on_gpt2(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    gpt2().save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", dtype="float32")
    fields = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    for i, config in enumerate(
        (peft.LoraConfig(bias="lora_only", **fields), peft.IA3Config(feedforward_modules=["mlp.c_proj"], **fields))
    ):
        model = peft.get_peft_model(gpt2(), config)
        stir(model)
        model.save_pretrained(tmp_path / str(i))
        ours = logits(base, Adapter.load(tmp_path / str(i)))
        torch.testing.assert_close(ours, peft_logits(model, IDS, 0), rtol=1e-4, atol=1e-4)


def test_a_prompt_of_real_embeddings_is_that_text(base: Base) -> None:
    text = torch.tensor([7, 3, 60])
    adapter = fresh(base, kind="prompt", num_tokens=3, init="text", init_text=text.tolist())
    rows = adapter.parts[0].tensors["rows"]
    assert torch.equal(rows, base.host("model.embed_tokens").weight().t()[text])
    whole = logits(base, ids=torch.cat([text.expand(2, -1), IDS], dim=1))[:, 3:]
    assert torch.equal(logits(base, adapter), whole)


def test_a_prefix_of_a_texts_cache_is_that_text(base: Base, theirs: Any) -> None:
    text = torch.tensor([[7, 3, 60, 2]])
    with torch.no_grad():
        cache = theirs(text, use_cache=True).past_key_values
    keys, values = (
        torch.stack([getattr(layer, n)[0].transpose(0, 1) for layer in cache.layers]) for n in ("keys", "values")
    )
    spec = parse({"kind": "prefix", "num_tokens": 4, "encoder": 0, "init": "text", "init_text": text[0].tolist()})
    adapter = create(base, spec, torch.Generator(), stats={"": InitStats(key=keys, value=values)})
    whole = logits(base, ids=torch.cat([text.expand(2, -1), IDS], dim=1))[:, 4:]
    torch.testing.assert_close(logits(base, adapter), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="needs the keys and values of the text"):
        create(base, spec, torch.Generator())
    with pytest.raises(ValueError, match="can't come out of a network"):
        parse({"kind": "prefix", "init": "text"})


def reference_bottleneck(model: Any, adapter: Adapter) -> Any:
    """The adapter as hooks on transformers' own sublayers."""
    model = copy.deepcopy(model)
    for part in adapter.parts:
        _, layer, place = part.target.split(".")
        block = model.model.layers[int(layer)]
        t, scale = part.tensors, adapter.spec._scale
        sublayer = block.self_attn if place == "attn_out" else block.mlp
        seen: dict[str, Tensor] = {}

        def hook(
            module: nn.Module,
            args: Any,
            kwargs: Any,
            out: Any,
            t: Any = t,
            scale: float = scale,
            style: str = adapter.spec.style,
        ) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            source = (args[0] if args else kwargs["hidden_states"]) if style == "parallel" else h
            update = F.linear(torch.relu(F.linear(source, t["down"], t["down_bias"])), t["up"], t["up_bias"])
            h = h + scale * update
            return (h, *out[1:]) if isinstance(out, tuple) else h

        sublayer.register_forward_hook(hook, with_kwargs=True)
        seen.clear()
    return model


@pytest.mark.parametrize(
    ("style", "places", "scale"), [("houlsby", 4, 1.0), ("pfeiffer", 2, 1.0), ("parallel", 2, 4.0)]
)
def test_bottlenecks_are_what_the_papers_say(style: str, places: int, scale: float, base: Base, theirs: Any) -> None:
    adapter = stirred(fresh(base, kind="bottleneck", style=style, size=5))
    assert len(adapter.parts) == places and adapter.spec._scale == scale
    assert adapter.num_parameters == places * (2 * 32 * 5 + 32 + 5)
    with torch.no_grad():
        expected = reference_bottleneck(theirs, adapter)(IDS).logits
    torch.testing.assert_close(logits(base, adapter), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_houlsbys_norms_are_trained_beside_the_bottlenecks(family: str, tmp_path: Path) -> None:
    from tests.models import tiny

    base, model = tiny.base(family)
    adapter = fresh(base, kind="bottleneck", style="houlsby", size=4, norms=True, layers="last:1")
    norms = [p for p in adapter.parts if p.kind == "full"]
    named = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.dim() == 1 and ("norm" in n or "ln_" in n)}
    last = max(int(part) for path in named for part in path.split(".") if part.isdigit())
    assert {p.target for p in norms} == {path for path in named if f".{last}." in path}
    for part in norms:
        assert torch.equal(part.tensors["weight"], model.get_parameter(f"{part.target}.weight"))
        assert ("bias" in part.tensors) == (family == "gpt2")
    ids = IDS % 60
    assert torch.equal(logits(base, adapter, ids=ids), logits(base, ids=ids))
    moved = stirred(adapter)
    moved.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.digest == moved.digest
    assert not torch.allclose(logits(base, again, ids=ids), logits(base, ids=ids), atol=1e-3)
    with pytest.raises(ValueError, match="which norms belong to `modules`"):
        parse({"kind": "bottleneck", "norms": True, "modules": ["fc"]})


@pytest.mark.parametrize(
    ("layers", "expected"), [("last:1", {"1"}), ("first:1", {"0"}), ((1,), {"1"}), (None, {"0", "1"})]
)
def test_bottlenecks_in_chosen_blocks(layers: Any, expected: set[str], base: Base) -> None:
    adapter = fresh(base, kind="bottleneck", layers=layers)
    assert {target.split(".")[1] for target in adapter.targets} == expected


@pytest.mark.parametrize("layers", ["last:9", "middle", (5,)])
def test_blocks_that_are_not_there(layers: Any, base: Base) -> None:
    with pytest.raises(ConfigError, match="layers"):
        fresh(base, kind="bottleneck", layers=layers)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "token_rows", "tokens": [1, 64]}, r"tokens \[64\] are outside its 64 rows"),
        ({"kind": "token_rows"}, "`tokens` is empty"),
        ({"kind": "token_rows", "tokens": [1, 1]}, "stands twice"),
        ({"kind": "ia3", "targets": ["embed_tokens"]}, "no activations to scale"),
        ({"kind": "bitfit", "targets": ["embed_tokens"]}, "embedding layers have no bias"),
        ({"kind": "full", "only": "bias"}, "it has no bias"),
        ({"kind": "lora", "rank": 2, "parameters": ["experts.down_proj"]}, "experts in a file"),
    ],
)
def test_what_cannot_be_says_so(fields: dict[str, Any], match: str, base: Base) -> None:
    with pytest.raises(TargetError, match=match):
        fresh(base, **fields)


def test_companions_come_with_a_lora(base: Base) -> None:
    adapter = fresh(base, kind="lora", rank=2, targets=["q_proj"], modules_to_save=["lm_head"], trainable_tokens=[4, 5])
    assert [(p.kind, p.target) for p in adapter.parts[2:]] == [
        ("full", "lm_head"),
        ("token_rows", "model.embed_tokens"),
    ]
    assert torch.equal(logits(base, adapter), logits(base))


def test_texts_in_fields_become_tokens(base: Base) -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    assert parse({"kind": "lora", "invocation": "ab"}).prepared(encode).model_dump()["invocation"] == (97, 98)
    assert parse({"kind": "prompt", "init": "text", "init_text": "a"}).prepared(encode).model_dump()["init_text"] == (
        97,
    )
    with pytest.raises(Unsupported, match="still a text"):
        lower_adapter(fresh(base, kind="lora", rank=2, invocation="ab"), base)
    with pytest.raises(ConfigError, match="init_text"):
        fresh(base, kind="prompt", init="text")
