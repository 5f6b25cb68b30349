"""LoRA on fused experts: PEFT's packed files, and one plain part per expert here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.tiny import stir
from veneer.adapter import Adapter
from veneer.errors import FormatError

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def wrapped(**fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **fields))
    stir(model)
    return model


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parity
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("modules", [["q_proj"], []])
def test_experts_in_both_directions(parameters: list[str], modules: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = wrapped(target_modules=modules, target_parameters=parameters)
    model.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert len(adapter.parts) == 2 * (len(modules) + 3 * len(parameters))
    merged = wrapped(target_modules=modules, target_parameters=parameters).merge_and_unload()
    before, after = dict(mixtral().named_parameters()), dict(merged.named_parameters())
    for target in adapter.targets:
        parameter, _, expert = target.rpartition(".")
        name = f"{target}.weight" if f"{target}.weight" in before else parameter
        change = after[name] - before[name]
        expected = change if name != parameter else change[int(expert)]
        torch.testing.assert_close(adapter.delta(target), expected, rtol=1e-4, atol=1e-5)
    adapter.save(tmp_path / "ours")
    assert Adapter.load(tmp_path / "ours").digest == adapter.digest
    theirs, ours = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "ours").eval()
        torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits, rtol=1e-5, atol=1e-5)


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_what_cannot_be_told_from_the_file_is_refused(tmp_path: Path) -> None:
    a, b = torch.ones(6, 4), torch.ones(5, 6)
    start = "base_model.model.layers.0.experts"
    nested = {f"{start}.{n}lora_{x}.weight": t for n in ("", "base_layer.") for x, t in (("A", a), ("B", b))}
    for parameters, match in (
        (["experts.one", "experts.two"], "whose names cannot be told"),
        (["experts.gate_up_proj"], "2 packed parameters"),
        (["experts.gate_up_proj", "experts.down_proj", "other.x"], "'other.x', but no tensor"),
    ):
        with pytest.raises(FormatError, match=match):
            Adapter.load(write(tmp_path, nested, target_parameters=parameters))
    with pytest.raises(FormatError, match="not experts of rank 4"):
        Adapter.load(write(tmp_path, dict(list(nested.items())[:2]), target_parameters=["experts.w"], r=4))
    with pytest.raises(FormatError, match=r"lacks lora_B\.weight"):
        Adapter.load(write(tmp_path, dict(list(nested.items())[:1]), target_parameters=["experts.w"]))
