"""What the native decoder keeps between the forward and the backward pass, tensor by tensor.

A packed token costs, in a gated block with every projection adapted and 16-bit activations,

    2 (2 h + 2 (H + K) d + 2 f) + 2 sum(R) + 4 H   bytes a layer

h hidden, H and K query and key heads of d, f the MLP width, R the ranks stacked on each group. There is no padding and no S x S
term: attention keeps q, k, v, its output and one log-sum-exp a head. act(gate) * up is computed again, so f counts twice and not
four times; so is an RMSNorm before a product, so h counts twice and not four times. A frozen projection without such a norm keeps
its input only where it carries an adapter, and nothing is kept below the lowest adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from veneer.models.config import DecoderConfig

STATISTIC = 4
"""Bytes of one fp32 number a row: a norm's inverse deviation, a head's log-sum-exp."""


@dataclass(frozen=True)
class Traffic:
    """What is adapted in a run.

    ranks         native group ("layers.3.qkv") -> ranks stacked on it; 0 for a part without a low-rank shrink (a scale, a bias)
    from_input    gradients flow from the first layer's input on: virtual tokens, prefixes, or a trained embedding
    label_share   the share of tokens with a label; the last block's MLP and the head run on those alone
    """

    ranks: Mapping[str, int]
    from_input: bool = False
    label_share: float = 1.0

    def adapted(self, layer: int, group: str) -> bool:
        return f"layers.{layer}.{group}" in self.ranks

    def shrink(self, layer: int, group: str) -> int:
        return self.ranks.get(f"layers.{layer}.{group}", 0)

    @property
    def lowest(self) -> int | None:
        """The first layer that carries an adapter, or None where only the head does."""
        return min((int(n.split(".")[1]) for n in self.ranks if n.startswith("layers.")), default=None)


def saved(config: DecoderConfig, traffic: Traffic, itemsize: int, layer: int) -> dict[str, float]:
    """Tensor -> bytes per packed token kept by one block."""
    lowest = traffic.lowest
    if not traffic.from_input and (lowest is None or layer < lowest):
        return {}
    flows = traffic.from_input or layer != lowest
    share = traffic.label_share if layer == config.layers - 1 else 1.0
    attention = _attention(config, traffic, itemsize, layer, flows)
    reached = flows or traffic.adapted(layer, "qkv") or traffic.adapted(layer, "o")
    return attention | {name: size * share for name, size in _mlp(config, traffic, itemsize, layer, reached).items()}


def _norm(config: DecoderConfig, itemsize: int) -> float:
    """A norm that stands alone keeps its input and one or two statistics."""
    return config.hidden * itemsize + STATISTIC * (2 if config.norm == "layer" else 1)


def _normed_product(
    config: DecoderConfig, itemsize: int, norm: str, group: str, *, flows: bool, adapted: bool
) -> dict[str, float]:
    """What a pre-norm and the product after it keep. An RMSNorm is part of the product, which keeps the residual stream alone."""
    wide = config.hidden * itemsize
    if config.pre_norms and config.norm != "layer":
        return {f"{norm} input": wide} if flows or adapted else {}
    kept = {f"{norm} input": _norm(config, itemsize)} if flows and config.pre_norms else {}
    return kept | ({f"{group} input": wide} if adapted else {})


def _attention(config: DecoderConfig, traffic: Traffic, itemsize: int, layer: int, flows: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    adapted = traffic.adapted(layer, "qkv")
    found |= _normed_product(config, itemsize, "attn_norm", "qkv", flows=flows, adapted=adapted)
    if adapted:
        found["qkv shrink"] = traffic.shrink(layer, "qkv") * itemsize
    if flows or adapted:
        if config.qk_norm is not None:
            found["q, k before their norms"] = (heads + keys) * itemsize
        found["q, k, v"] = (heads + 2 * keys) * itemsize
        found["attention statistics"] = config.heads * STATISTIC
        found["attention output"] = heads * itemsize
    if traffic.adapted(layer, "o"):
        found["attention output"] = heads * itemsize
        found["o shrink"] = traffic.shrink(layer, "o") * itemsize
    if config.post_norms and (flows or adapted or traffic.adapted(layer, "o")):
        found["post_attn_norm input"] = _norm(config, itemsize)
    return found


def _mlp(config: DecoderConfig, traffic: Traffic, itemsize: int, layer: int, reached: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    up, down = traffic.adapted(layer, "up"), traffic.adapted(layer, "down")
    width = config.intermediate * itemsize
    found |= _normed_product(config, itemsize, "mlp_norm", "up", flows=reached, adapted=up)
    if config.block == "parallel":  # both norms read the same residual stream, counted above
        found.pop("mlp_norm input", None)
    if up:
        found["up shrink"] = traffic.shrink(layer, "up") * itemsize
    if reached or up or down:
        found["gate, up" if config.gated else "up"] = width * (2 if config.gated else 1)
    if down:
        found["down shrink"] = traffic.shrink(layer, "down") * itemsize
        if not config.gated:
            found["down input"] = width
    if config.post_norms and (reached or up or down):
        found["post_mlp_norm input"] = _norm(config, itemsize)
    return found


def activation_bytes(config: DecoderConfig, traffic: Traffic, tokens: int, itemsize: int, *, recompute: int = 0) -> int:
    """Bytes kept for `tokens` packed tokens. The first `recompute` blocks keep their input only, and one of them is live."""
    per_layer = [sum(saved(config, traffic, itemsize, layer).values()) for layer in range(config.layers)]
    kept = sum(per_layer[recompute:]) + sum(config.hidden * itemsize for size in per_layer[:recompute] if size)
    live = max(per_layer[:recompute], default=0.0)
    end = (_norm(config, itemsize) + config.hidden * itemsize) * traffic.label_share
    return round(tokens * (kept + live + end))


def workspace_bytes(config: DecoderConfig, tokens: int, itemsize: int) -> int:
    """The largest set of temporaries that one block's backward pass holds at once.

    In the MLP: act(gate) * up computed again, its gradient and that of gate and up. In attention: gradients of q, k, v and of the
    output. Beside either, the gradient of the residual stream and of the norm's output.
    """
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    mlp = config.intermediate * (4 if config.gated else 2)
    attention = 2 * heads + 2 * keys
    return tokens * itemsize * (max(mlp, attention) + 2 * config.hidden)


def logits_bytes(vocab: int, rows: int, itemsize: int, chunk: int) -> int:
    """Scores that exist at one time: fp32, beside their 16-bit copy on the way in and out of the product."""
    copy = itemsize if itemsize < 4 else 0
    return min(rows, chunk) * vocab * (4 + copy)
