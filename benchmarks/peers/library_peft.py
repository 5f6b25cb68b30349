"""PEFT's `svd` combination of adapters that a file holds: seconds and the relative error. Runs in the peers' environment.

    python benchmarks/peers/library_peft.py FACTORS.safetensors RANK

The file has `TARGET|ADAPTER|A` and `TARGET|ADAPTER|B`. The base is a module with a zero weight at each target.
"""

import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file


def module_at(root, path, layer):
    """Put `layer` at a dotted path, with empty modules on the way."""
    *above, last = path.split(".")
    for name in above:
        if not hasattr(root, name):
            root.add_module(name, torch.nn.Module())
        root = getattr(root, name)
    root.add_module(last, layer)


def main():
    factors, rank = load_file(sys.argv[1]), int(sys.argv[2])
    targets = sorted({name.split("|")[0] for name in factors})
    adapters = sorted({name.split("|")[1] for name in factors})
    base = torch.nn.Module()
    for target in targets:
        b, a = factors[f"{target}|{adapters[0]}|B"], factors[f"{target}|{adapters[0]}|A"]
        layer = torch.nn.Linear(a.shape[1], b.shape[0], bias=False)
        torch.nn.init.zeros_(layer.weight)
        module_at(base, target, layer)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = get_peft_model(base, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    layers = {target: model.base_model.model.get_submodule(target) for target in targets}
    with torch.no_grad():
        for target, layer in layers.items():
            for name in adapters:
                layer.lora_A[name].weight.copy_(factors[f"{target}|{name}|A"])
                layer.lora_B[name].weight.copy_(factors[f"{target}|{name}|B"])
        begin = time.perf_counter()
        model.base_model.add_weighted_adapter(
            adapters, [1.0] * len(adapters), "sum", combination_type="svd", svd_rank=rank
        )
        seconds = time.perf_counter() - begin
        lost = whole = 0.0
        for layer in layers.values():
            exact = sum(layer.get_delta_weight(name).double() for name in adapters)
            lost += float((layer.get_delta_weight("sum").double() - exact).square().sum())
            whole += float(exact.square().sum())
    print(json.dumps({"seconds": seconds, "error": (lost / whole) ** 0.5, "targets": len(targets)}))


if __name__ == "__main__":
    main()
