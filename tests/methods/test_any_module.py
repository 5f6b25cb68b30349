"""Every method that a plain module can carry, on a decoder outside the native table and on a GPT-2 with Conv1D."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.formats.tiny import gpt2, llama, stir
from veneer.adapter import Adapter, Part
from veneer.errors import TargetError, Unsupported
from veneer.inject import ModuleSource, attach, create
from veneer.methods import METHODS, load_all, parse

load_all()
IDS = torch.randint(53, (2, 7), generator=torch.Generator().manual_seed(1))


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=53, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "modules_to_save": ["fc2"], "targets": ["q_proj", "v_proj"]}, "dora": {"rank": 2},
    "ia3": {"targets": ["k_proj", "v_proj", "fc2"], "feedforward": ["fc2"]}, "vera": {"rank": 4}, "bitfit": {},
    "lora_xs": {"rank": 4}, "adalora": {"rank": 4, "target_rank": 2}, "shira": {"rank": 2}, "oft": {"block": 8},
    "full": {"targets": ["fc1"]}, "token_rows": {"tokens": IDS[0, :3].unique().tolist()},
    "bottleneck": {"modules": ["model.decoder.layers.0.self_attn", "model.decoder.layers.1.fc2"], "size": 3},
}  # fmt: skip
ON_GPT2 = {
    **FIELDS, "lora": {"rank": 2, "targets": ["c_attn", "wte"]},
    "ia3": {}, "full": {"targets": ["c_fc"]}, "bottleneck": {"modules": ["transformer.h.0.attn"], "size": 3},
}  # fmt: skip
CASES = [("opt", k) for k in FIELDS] + [("gpt2", k) for k in ON_GPT2]


def run(model: nn.Module) -> Tensor:
    logits: Tensor = model(IDS).logits
    return logits


def test_every_method_is_tried_or_refused() -> None:
    assert set(METHODS) - set(FIELDS) == {"prompt", "ptuning", "prefix"}


@pytest.mark.parametrize(("which", "kind"), CASES)
def test_identical_at_the_start_trained_saved_and_taken_off(which: str, kind: str, tmp_path: Path) -> None:
    model = opt() if which == "opt" else gpt2()
    fields = (FIELDS if which == "opt" else ON_GPT2)[kind]
    with torch.no_grad():
        before = run(model)
    handle = attach(
        model, create(ModuleSource(model), parse({"kind": kind, **fields}), torch.Generator().manual_seed(0))
    )
    assert torch.equal(run(model), before)
    goal = before.roll(1, dims=-1)
    optimiser = torch.optim.Adam(handle.parameters(), lr=3e-2)
    losses = []
    for _ in range(20):
        loss = (run(model) - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    with torch.no_grad():
        trained = run(model)
        with handle.disabled():
            assert torch.equal(run(model), before)
    adapter = handle.adapter()
    handle.detach()
    assert torch.equal(run(model), before)
    adapter.save(tmp_path / "a")
    attach(model, Adapter.load(tmp_path / "a"))
    assert torch.equal(run(model), trained)


@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_what_needs_the_native_decoder_says_so(kind: str) -> None:
    part = Part(kind, METHODS[kind].site, None, {"rows": torch.ones(1, 4)})
    with pytest.raises(Unsupported, match="which a plain module does not offer") as caught:
        attach(opt(), Adapter(METHODS[kind](), (part,)))
    assert caught.value.help is not None and "vn.load_base" in caught.value.help


def test_a_norm_that_peft_trained_whole(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["model.norm", "lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama(), config)
    stir(model)
    model.save_pretrained(tmp_path)
    plain = llama()
    attach(plain, Adapter.load(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(run(plain), run(model.eval()), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said_at_once() -> None:
    model = opt()
    adapter = create(
        ModuleSource(model), parse({"kind": "dora", "rank": 2, "targets": ["q_proj"]}), torch.Generator().manual_seed(0)
    )
    wrong = [replace(p, tensors={**p.tensors, "magnitude": torch.ones(3)}) for p in adapter.parts]
    whole = Part("full", "override", "model.decoder.final_layer_norm", {"weight": torch.ones(3), "gain": torch.ones(1)})
    missing = Part("full", "override", "model.decoder.no_norm", {"weight": torch.ones(3)})
    with pytest.raises(TargetError) as caught:
        attach(model, replace(adapter, parts=(*wrong, whole, missing)))
    for text in ("magnitude is [3], expected [16]", "the layer has [16]", "gain is [1], the layer has none", "no_norm"):
        assert text in str(caught.value)


def test_a_parallel_bottleneck_reads_the_modules_input() -> None:
    model = opt()
    spec = parse(
        {"kind": "bottleneck", "style": "parallel", "modules": ["model.decoder.layers.0.self_attn"], "size": 2}
    )
    adapter = create(ModuleSource(model), spec, torch.Generator().manual_seed(0))
    stirred = adapter.map_tensors(lambda t: t + 0.1)
    handle = attach(model, stirred)
    seen: list[Tensor] = []
    inner = model.model.decoder.layers[0].self_attn.layer
    inner.register_forward_hook(lambda m, a, k, o: seen.append(k["hidden_states"] if not a else a[0]), with_kwargs=True)
    t = stirred.parts[0].tensors
    out = model.model.decoder.layers[0].self_attn(hidden_states=torch.ones(1, 3, 16))[0]
    bare = inner(hidden_states=torch.ones(1, 3, 16))[0]
    update = torch.relu(seen[0] @ t["down"].t() + t["down_bias"]) @ t["up"].t() + t["up_bias"]
    torch.testing.assert_close(out, bare + 4.0 * update)
    handle.detach()
