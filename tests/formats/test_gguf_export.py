"""Exports: read back by our own reader, computed by llama.cpp, and refused where something would be lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from tests.models.tiny import FAMILIES, YARN_ROPE, checkpoint
from veneer import methods
from veneer.adapter import Adapter, Part
from veneer.errors import TargetError, Unsupported
from veneer.formats.gguf_export import export_adapter, export_model, halves_to_pairs, heads_to_thirds, q8_0
from veneer.formats.gguf_words import tokenizer_fields
from veneer.formats.ollama import MARK, Turns, modelfile, stop_words, turns
from veneer.formats.vllm import limits, servable
from veneer.inject import create
from veneer.merge import Merged, store_of
from veneer.methods.lora import LoRA
from veneer.models.base import Base
from veneer.models.gguf import GgufFile, pairs_to_halves, thirds_to_heads
from veneer.models.load import load_base
from veneer.models.tokenizer import Tokenizer

IDS = torch.arange(3, 33).view(2, 15)


def trained(base: Base, spec: Any, size: float = 0.05) -> Adapter:
    g = torch.Generator().manual_seed(3)
    fresh = create(base, spec, g)
    return fresh.map_tensors(lambda t: t + size * torch.randn(t.shape, generator=g) if t.is_floating_point() else t)


def logits(base: Base) -> Tensor:
    with torch.no_grad():
        return base.logits(IDS)


@pytest.mark.parametrize("name", [*FAMILIES, "llama-tied-mha", "llama-biases", "llama-linear", "llama-llama3"])
def test_a_model_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    family = name.split("-")[0]
    changes = {} if name == "gpt2" else {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
    if family == "gemma3_text":
        changes = {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6}
    base = load_base(checkpoint(name, tmp_path / "base", **changes), "float32")
    export_model(store_of(base), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype="f32")
    again = load_base(tmp_path / "m.gguf", "float32")
    assert float((logits(again) - logits(base)).norm() / logits(base).norm()) < 1e-5
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize(("filetype", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_each_type_rounds_once(tmp_path: Path, filetype: Any, error: float) -> None:
    base = load_base(checkpoint("llama", tmp_path / "base", hidden_size=64, intermediate_size=96), "float32")
    adapter = trained(base, LoRA(rank=4))
    export_model(Merged(base, adapter), tmp_path / "m.gguf", {"tokenizer.ggml.model": "none"}, filetype=filetype)
    back = GgufFile(tmp_path / "m.gguf")
    for target in adapter.targets:
        exact = base.host(target).weight() + adapter.delta(target)
        assert float((back.read(f"{target}.weight") - exact).norm() / exact.norm()) < error


def test_q8_0_is_ggufs_own() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0
    wanted = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType.Q8_0))
    assert (q8_0(weight) != wanted).double().mean() < 0.005  # a value at a half may fall to either side
    assert torch.equal(q8_0(weight)[3, 34:68], wanted[3, 34:68])


def test_the_orders_are_inverse() -> None:
    weight = torch.randn(24, 5)
    assert torch.equal(pairs_to_halves(halves_to_pairs(weight, 4), 4), weight)
    assert torch.equal(thirds_to_heads(heads_to_thirds(weight, 2), 2), weight)


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    window = load_base(checkpoint("mistral-window", tmp_path / "a"), "float32")
    with pytest.raises(Unsupported, match="sliding window"):
        export_model(store_of(window), tmp_path / "m.gguf", {})
    assert not list(tmp_path.glob("*.gguf"))
    long = load_base(checkpoint("phi3-longrope", tmp_path / "b"), "float32")
    with pytest.raises(Unsupported, match="longrope"):
        export_model(store_of(long), tmp_path / "m.gguf", {})
    base = load_base(checkpoint("llama-tied-mha", tmp_path / "c"), "float32")
    dora = trained(base, methods.parse({"kind": "dora", "rank": 2}))
    with pytest.raises(TargetError, match="dora at model") as refusal:
        export_adapter(dora, base.hf_config, tmp_path / "a.gguf")
    with pytest.raises(TargetError, match="aLoRA"):
        export_adapter(trained(base, LoRA(rank=2, invocation=(5, 6))), base.hf_config, tmp_path / "a.gguf")
    assert "merges it" in (refusal.value.help or "")
    for target in ("model.embed_tokens", "lm_head"):
        with pytest.raises(TargetError, match=target):
            export_adapter(trained(base, LoRA(rank=2, targets=(target,))), base.hf_config, tmp_path / "a.gguf")
    with pytest.raises(Unsupported, match="q8_0"):
        export_adapter(trained(base, LoRA(rank=2)), base.hf_config, tmp_path / "a.gguf", filetype="q8_0")


SLIDES, SEES = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("qwen2-window", {}, "sliding window of 5"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding window of 8"),
        ("phi3-window", {}, "sliding window of 8"),
        ("gemma2", {"layer_types": [SEES] * 3}, "which layers"),
        ("gemma3_text", {"layer_types": [SLIDES, SEES, SLIDES], "query_pre_attn_scalar": 16}, "which layers"),
        ("gemma2", {"attn_logit_softcapping": None}, "soft caps"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama-yarn", {"attention_factor": 2.0}, "attention_factor 2.0"),
        ("llama-yarn", {"beta_fast": 1.5}, "beta_fast 1.5"),
        ("llama-yarn", {"beta_slow": 4.0}, "beta_slow 4.0"),
        ("llama-yarn", {"truncate": False}, "truncate False"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], why: str
) -> None:
    if name == "llama-yarn":
        changes = {"rope_parameters": {**YARN_ROPE, **changes}}
    base = load_base(checkpoint(name, tmp_path / "base", **changes), "float32")
    with pytest.raises(Unsupported, match=why):
        export_model(store_of(base), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype="f32")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-yarn", {"rope_parameters": {**YARN_ROPE, "beta_fast": 32.0, "truncate": True}}),
        ("qwen2-window", {"sliding_window": 128}),
        ("gemma2", {"layer_types": [SLIDES, SEES, SLIDES], "query_pre_attn_scalar": 16}),
    ],
)
def test_what_makes_no_difference_is_not_refused(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    base = load_base(checkpoint(name, tmp_path / "base", **changes), "float32")
    export_model(store_of(base), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype="f32")
    again = load_base(tmp_path / "m.gguf", "float32")
    ids = torch.arange(2, 62)[None]
    assert float((again.logits(ids) - base.logits(ids)).norm() / base.logits(ids).norm()) < 1e-5


@pytest.mark.parametrize(("filetype", "size", "fits"), [("f16", 1e5, False), ("q8_0", 1e5, True), ("q8_0", 1e7, False)])
def test_values_beyond_a_type_are_refused(tmp_path: Path, filetype: Any, size: float, fits: bool) -> None:
    folder = checkpoint("llama", tmp_path / "base", hidden_size=64, intermediate_size=96)
    found = load_file(folder / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight"][3, 5] = size
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    base = load_base(folder, "float32")
    if fits:
        export_model(store_of(base), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype=filetype)
        return
    with pytest.raises(Unsupported, match=r"layers.1.mlp.up_proj.*can't hold") as refusal:
        export_model(store_of(base), tmp_path / "m.gguf", tokenizer_fields(None, 0), filetype=filetype)
    assert "bf16" in (refusal.value.help or "")
    assert {file.name for file in tmp_path.iterdir()} == {"base"}


def read_adapter(path: Path) -> tuple[float, dict[str, Tensor]]:
    from gguf import GGUFReader

    reader = GGUFReader(str(path))
    field = reader.get_field("adapter.lora.alpha")
    assert field is not None
    return float(field.contents()), {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors}


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 8.0},
        {"scaling": "alpha/sqrt(r)"},
        {"rank_pattern": {"v_proj": 3}},
        {"alpha_pattern": {"up_proj": 3.0}, "rank_pattern": {"down_proj": 2}, "scaling": "alpha/sqrt(r)"},
    ],
)
def test_an_adapter_says_its_effective_update(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = load_base(checkpoint("llama", tmp_path / "base"), "float32")
    adapter = trained(base, LoRA(rank=4, **fields))
    export_adapter(adapter, base.hf_config, tmp_path / "a.gguf")
    alpha, tensors = read_adapter(tmp_path / "a.gguf")
    for target, heads in (
        ("self_attn.q_proj", 4),
        ("self_attn.k_proj", 2),
        ("self_attn.v_proj", 0),
        ("mlp.up_proj", 0),
    ):
        stored = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "up_proj": "ffn_up"}[target.split(".")[1]]
        a, b = tensors[f"blk.1.{stored}.weight.lora_a"], tensors[f"blk.1.{stored}.weight.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        delta = scale * b @ a
        torch.testing.assert_close(
            pairs_to_halves(delta, heads) if heads else delta, adapter.delta(f"model.layers.1.{target}")
        )
    assert (alpha != 0) == ("scaling" not in fields or "rank_pattern" not in fields)


def test_a_tokenizer_whose_cutting_has_no_name_is_refused() -> None:
    chat = words(None)
    assert tokenizer_fields(chat, 300)["tokenizer.ggml.pre"] == "gpt-2"
    chat.fast.pre_tokenizer = pre_tokenizers.Split("x", "isolated")
    with pytest.raises(Unsupported, match="cuts text"):
        tokenizer_fields(chat, 300)


CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content + '[/]' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"


def words(template: str | None) -> Tokenizer:
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Fast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "th", "the"])}
    fast = Fast(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_special_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<eos>", special=True)])
    return Tokenizer(fast, {"eos_token": "<eos>"}, template)


def test_a_template_of_texts_around_messages_becomes_go() -> None:
    chat = words(CHATML)
    found = turns(chat)
    assert found.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.default == "<|im_start|>system\nBe kind<|im_end|>\n"
    assert found.answer == "<|im_start|>assistant\n"
    assert MARK not in found.go()
    text = modelfile(chat, "m.gguf", "a.gguf")
    assert text.startswith("FROM ./m.gguf\nADAPTER ./a.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert stop_words(chat) == ["<eos>", "<|im_end|>"]
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert found.render(talk) == chat.render(talk, add_generation_prompt=True)
    plain = turns(words(NO_SYSTEM))
    assert isinstance(plain, Turns)
    assert plain.opening + plain.default == "<bos>"


@pytest.mark.parametrize("template", [NUMBERED, None])
def test_a_cleverer_template_is_refused(template: str | None) -> None:
    with pytest.raises(Unsupported):
        turns(words(template))


def test_words_of_a_file_follow_the_embedding() -> None:
    chat = words(CHATML)
    fields = tokenizer_fields(chat, 300)
    assert len(fields["tokenizer.ggml.tokens"]) == 300
    assert fields["tokenizer.ggml.token_type"][256:262] == [1, 1, 3, 3, 5, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == 259
    assert fields["tokenizer.ggml.eot_token_id"] == 258
    with pytest.raises(Unsupported, match="beyond"):
        tokenizer_fields(chat, 100)


def test_vllm_gets_one_rank_and_one_scale(tmp_path: Path) -> None:
    base = load_base(checkpoint("llama", tmp_path / "base"), "float32")
    adapter = trained(
        base, LoRA(rank=4, scaling="alpha/sqrt(r)", rank_pattern={"q_proj": 9}, alpha_pattern={"up_proj": 2.0})
    )
    assert limits(adapter) == []
    plain, rank = servable(adapter)
    assert rank == 16
    assert {p.tensors["A"].shape[0] for p in plain.parts} == {9}
    for target in adapter.targets:
        torch.testing.assert_close(plain.delta(target), adapter.delta(target))
    plain.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (9, 9, {}, {})
    vera = trained(base, methods.parse({"kind": "ia3"}))
    assert "IA3" in limits(vera)[0] and "IA3" in limits(vera, "sglang")[0]
    large = adapter.map_tensors(lambda t: t.repeat(*((200, 1) if t.shape[0] in (4, 9) else (1, 200))))
    assert any("--max-lora-rank" in line for line in limits(large)) and limits(large, "sglang") == []
    invoked = replace(adapter, spec=adapter.spec.model_copy(update={"invocation": (5, 6)}))
    assert any("aLoRA" in line for line in limits(invoked)) and any(
        "aLoRA" in line for line in limits(invoked, "sglang")
    )
    with pytest.raises(Unsupported, match="aLoRA") as refusal:
        servable(invoked)
    assert "`veneer serve` serves any" in (refusal.value.help or "")
    norm = Part("full", "override", "model.norm", {"weight": torch.ones(48)})
    with pytest.raises(Unsupported, match="modules_to_save"):
        servable(Adapter(adapter.spec, (*adapter.parts, norm)))


@pytest.mark.parity
@pytest.mark.parametrize("filetype", ["f16", "q8_0"])
def test_llama_cpp_speaks_the_exported_model(tmp_path: Path, filetype: Any) -> None:
    """Log probabilities of base, merged model, and base with the adapter beside it, through llama.cpp and through us."""
    xllamacpp = pytest.importorskip("xllamacpp")
    base, adapter = speaking(tmp_path)
    vocab = tokenizer_fields(base.tokenizer, base.config.vocab)
    export_model(store_of(base), tmp_path / "base.gguf", vocab, filetype=filetype)
    export_model(Merged(base, adapter), tmp_path / "merged.gguf", vocab, filetype=filetype)
    export_adapter(adapter, base.hf_config, tmp_path / "a.gguf")
    alone = generate(xllamacpp, tmp_path / "base.gguf")
    merged = generate(xllamacpp, tmp_path / "merged.gguf")
    beside = generate(xllamacpp, tmp_path / "base.gguf", tmp_path / "a.gguf")
    exact = load_base(tmp_path / "merged.gguf", "float32")
    bound = 0.02 if filetype == "f16" else 0.3  # llama.cpp rounds activations too: to f16, or to 8 bits
    assert apart(load_base(tmp_path / "base.gguf", "float32"), alone) < bound
    assert apart(exact, merged) < bound
    assert apart(exact, beside) < bound
    assert apart(exact, alone) > 1


PROMPT = "The quick brown fox"
COUNT = 16


def speaking(tmp_path: Path) -> tuple[Base, Adapter]:
    """A random llama with a byte tokenizer, peaked enough that greedy choices are clear, and an adapter."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 288, "num_key_value_heads": 2}
    folder = checkpoint("llama", tmp_path / "base", **sizes)
    chat = words(CHATML)
    # Only printable tokens win, so that every token is a piece of text of its own.
    found = load_file(folder / "model.safetensors")
    dull = [i for i in range(288) if not (token := chat.token(i)) or not token.isascii() or i >= 256]
    found["lm_head.weight"][dull] = 0
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(chat.fast.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": CHATML}))
    base = load_base(folder, "float32")
    return base, trained(base, LoRA(rank=4, scaling="alpha/sqrt(r)"), 0.06)


Steps = list[tuple[int, dict[int, float]]]


def apart(base: Base, steps: Steps) -> float:
    """The largest difference of log probabilities along what llama.cpp wrote."""
    ids = words(CHATML).encode(PROMPT)
    with torch.no_grad():
        scores = base.logits([[*ids, *(token for token, _ in steps)]])[0].log_softmax(-1)
    return max(
        abs(float(scores[len(ids) - 1 + i, token]) - value)
        for i, (_, listed) in enumerate(steps)
        for token, value in listed.items()
    )


def generate(xllamacpp: Any, model: Path, adapter: Path | None = None) -> Steps:
    """What llama.cpp writes: at each step its token, and the log probabilities of the four best."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cpuparams.n_threads = 1
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {
            "prompt": words(CHATML).encode(PROMPT),
            "max_tokens": COUNT,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 4,
            "n_probs": 1,
        }
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    steps = answer["choices"][0]["logprobs"]["content"]
    return [(step["id"], {best["id"]: best["logprob"] for best in step["top_logprobs"]}) for step in steps]
