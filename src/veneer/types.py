"""The words that every layer of veneer shares: sites, primitives, rows, and the one rule for the scale.

A method declares where it acts (its `Site`) and lowers each of its parts into primitives. The kernels in `ops/`, the native
decoder and the engine know primitives only; they never branch on a method's name.

Shapes: A `[rank, in]`, B `[out, rank]`; `delta = scale * B @ A`. In a `LowRank` primitive the scale is already inside B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from veneer.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Site: TypeAlias = Literal["weight", "sublayer", "tokens", "kv", "override"]
"""Where a part acts.

weight    a named projection, embedding or conv, through a Host
sublayer  the output of attention or of the MLP, before the residual add (and before a post-norm where the family has one)
tokens    rows before the input embeddings
kv        per-layer keys and values before position 0, after RoPE
override  a replaced tensor, or replaced embedding rows
"""

Sublayer: TypeAlias = Literal["attn_out", "mlp_out"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """y += (x A^T) B^T, the scale folded into B. A `[rank, in]`, B `[out, rank]`."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class InScale:
    """x <- x * vector, before the product. `[in]`."""

    vector: Tensor


@dataclass(frozen=True, eq=False)
class OutScale:
    """y <- y * vector, after the product and any LowRank. `[out]`. The bias is scaled too where `scales_bias`."""

    vector: Tensor
    scales_bias: bool


@dataclass(frozen=True, eq=False)
class Bias:
    """y <- y + vector. `[out]`."""

    vector: Tensor


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """h <- h + scale * (f(s D^T + d) U^T + u), where s is h itself or, for `parallel`, the sublayer's input.

    down D `[bottleneck, hidden]`, up U `[hidden, bottleneck]`.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    scale: float
    parallel: bool


@dataclass(frozen=True, eq=False)
class Tokens:
    """Embedding rows put before a sequence's own. `[num_tokens, hidden]`."""

    rows: Tensor


@dataclass(frozen=True, eq=False)
class KV:
    """Keys (after RoPE) and values that a layer sees before position 0. Each `[num_tokens, kv_heads, head_dim]`."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Override:
    """A tensor that stands in for the base's, as the checkpoint stores it; with `rows` (`[n]` indices), for those rows alone."""

    value: Tensor
    rows: Tensor | None = None


HostKind: TypeAlias = Literal["linear", "conv1d", "conv", "embedding", "norm", "sublayer", "tokens", "kv"]


@dataclass(frozen=True)
class HostShape:
    """The size of a place that can carry a part.

    linear, conv1d    in_features, out_features of y = x W^T (GPT-2's Conv1D stores the transpose)
    conv              a convolution of 1 to 3 dimensions as the matrix that its patches meet: in_features = channels of one group
                      times the kernel's cells, out_features = channels out; `kernel` and `groups` are the module's own
    embedding         in_features = vocabulary, out_features = hidden
    norm              both are its width; it has no product, only tensors that can be replaced
    sublayer          both are hidden
    tokens            in_features = vocabulary, out_features = hidden
    kv                in_features = kv_heads, out_features = head_dim, over `layers` layers
    """

    kind: HostKind
    in_features: int
    out_features: int
    has_bias: bool = False
    layers: int = 1
    kernel: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class BaseShape:
    """All the sizes of a base that a method or a plan needs, without a weight.

    hosts  module path -> shape, in checkpoint order
    head   module path of the output head, which `all-linear` leaves out ("" where there is none)
    norms  module path -> shape of the norms of hidden width, which targets never select
    embed_scale  what the model multiplies rows of its input embedding by (Gemma)
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    hosts: Mapping[str, HostShape]
    tied_head: bool = False
    head: str = ""
    norms: Mapping[str, HostShape] = field(default_factory=dict)
    embed_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Factors:
    """What an init gives: A `[rank, in]` and B `[out, rank]`.

    With `shifted`, training starts from W - scale * B @ A in place of W, so that the sum is W; the adapter is stored as an
    update of the original W (rank doubles), so the base never changes. What is taken away there is A and B themselves, or
    `taken`, another pair of their shapes.
    """

    A: Tensor
    B: Tensor
    shifted: bool = False
    taken: tuple[Tensor, Tensor] | None = None


HELD_FACTORS: dict[str, frozenset[str]] = {}
"""Init -> factors that stay as it makes them (MiCA's B). Filled by `inits/`, read by the methods: neither knows the other."""


Primitive: TypeAlias = LowRank | InScale | OutScale | Bias | Bottleneck | Tokens | KV | Override


@dataclass(frozen=True, eq=False)
class Lowered:
    """An adapter as the decoder sees it.

    weights    module path -> primitives of that projection or embedding ("model.layers.0.self_attn.q_proj")
    sublayers  (layer, "attn_out" | "mlp_out" | ...) -> bottlenecks there
    tokens     rows before the input, or None
    kv         layer -> keys and values before position 0
    overrides  tensor name ("model.norm.weight") -> the tensor that replaces it
    digest     identity of what was lowered, for caches
    invocation token ids that switch the adapter on (aLoRA), or None for always on
    """

    weights: Mapping[str, tuple[Primitive, ...]] = field(default_factory=dict)
    sublayers: Mapping[tuple[int, Sublayer], tuple[Bottleneck, ...]] = field(default_factory=dict)
    tokens: Tokens | None = None
    kv: Mapping[int, KV] = field(default_factory=dict)
    overrides: Mapping[str, Override] = field(default_factory=dict)
    digest: str = ""
    invocation: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one sequence that share one adapter.

    The tokens of a packed batch are the segments' tokens in order. Segments of one sequence stand side by side.
    `adapter` is an index into the bank, -1 for the bare base. `start` is the position of the first token in its sequence.
    `reach` is how many positions the sequence has in all, where the pass reads a part of them: LongRoPE turns all by that.
    """

    length: int
    sequence: int
    adapter: int = -1
    start: int = 0
    reach: int = 0


NEVER = 1 << 62
"""A position that no sequence reaches."""


def switch_at(tokens: Sequence[int], invocation: tuple[int, ...] | None) -> int:
    """Where an adapter starts to apply: at the start of the last invocation sequence, or `NEVER` without one (PEFT's rule).

    >>> switch_at([5, 1, 2, 9, 1, 2, 7], (1, 2)), switch_at([5, 6], None)
    (4, 0)
    """
    if invocation is None:
        return 0
    width = len(invocation)
    starts = range(len(tokens) - width, -1, -1)
    return next((i for i in starts if tuple(tokens[i : i + width]) == invocation), NEVER)


@dataclass(frozen=True)
class Span:
    """Rows `[start, stop)` of a packed batch, and the index of what applies to them (-1: nothing)."""

    start: int
    stop: int
    index: int


ScaleRule: TypeAlias = Callable[[float, int], float]

SCALE_RULES: Registry[ScaleRule] = Registry("scale rule")
SCALE_RULES["alpha/r"] = lambda alpha, rank: alpha / rank
SCALE_RULES["alpha/sqrt(r)"] = lambda alpha, rank: alpha / math.sqrt(rank)


def effective_scale(rule: str, alpha: float, rank: int) -> float:
    """The factor in `delta = scale * B @ A`. The only place where it is computed.

    `alpha/r` is LoRA (arXiv 2106.09685), `alpha/sqrt(r)` is rsLoRA (arXiv 2312.03732).

    >>> effective_scale("alpha/r", 32, 16), effective_scale("alpha/sqrt(r)", 16, 16)
    (2.0, 4.0)
    """
    return SCALE_RULES[rule](alpha, rank)
