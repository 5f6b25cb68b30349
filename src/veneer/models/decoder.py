"""One decoder for the families people use, with one forward pass for training, scoring and serving.

    hidden = decoder.forward(tokens, segments, bank, cache=None)
    h += attention(norm(h)); h += mlp(norm(h))          pre-norm; post-norms and parallel blocks by configuration

Tokens are packed: sequences lie end to end without padding, and `segments` says which rows belong to which sequence and which
adapter of the bank they use. There is no batch dimension and no mask.

The surprise: the decoder keeps no state. The base's tensors are read-only views of a mapped file; adapters come in the `bank`
argument; keys and values of earlier tokens live in the `cache` argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from veneer.errors import FormatError, Unsupported, listed
from veneer.models.bank import EMPTY, Bank, spans_of
from veneer.models.config import DecoderConfig, Layout, PartSpec
from veneer.models.group import Group
from veneer.models.project import is_overridden, packs_of, project, replace_rows, spans_at, with_bottlenecks
from veneer.models.rope import RopeTable
from veneer.models.state import Cache, Pass, Run
from veneer.models.step import Steps
from veneer.ops.attention import attention
from veneer.ops.gated import activate
from veneer.ops.loss import linear_cross_entropy, token_nll
from veneer.ops.low_rank import DenseFrozen, Frozen, gated_adapted_linear, norm_adapted_linear
from veneer.ops.native.shortlist import Sketch
from veneer.ops.norm import layer_norm, rms_norm
from veneer.ops.rope import rotary
from veneer.types import Override, Segment, Span


class Decoder:
    """The frozen model. `tensors` hold the native names of `Layout`; a projection may be a tensor or any `Frozen` product."""

    def __init__(self, config: DecoderConfig, layout: Layout, tensors: Mapping[str, Tensor | Frozen]) -> None:
        self.config, self.layout = config, layout
        self.tensors: dict[str, Tensor] = {n: t for n, t in tensors.items() if isinstance(t, Tensor)}
        self.embed = self.tensors["embed"]
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.groups: dict[str, Group] = {}
        for spec in layout.groups:
            found = tensors[spec.name]
            frozen = DenseFrozen(found) if isinstance(found, Tensor) else found
            bias = self.tensors.get(f"{spec.name}_bias")
            self.groups[spec.name] = Group(spec.name, frozen, bias, spec.parts, transposed=spec.kind == "conv1d")
        if config.tied_head:
            part = PartSpec(layout.head_path, 0, config.vocab)
            self.groups["head"] = Group("head", DenseFrozen(self.embed), None, (part,))
        self._replaceable = self._sizes()
        self._rope = {
            local: RopeTable(rope, config.head_dim, config.max_positions, self.device)
            for local, rope in ((False, config.rope), (True, config.local_rope))
            if rope is not None and config.positions == "rope"
        }
        halves = {local: table.half for local, table in self._rope.items()}
        self._steps = Steps(config, self.groups, self.tensors, halves)

    @property
    def turn(self) -> float:
        """The longest sequence that is turned by the ordinary frequencies: every position of a longer one is turned by others."""
        return min((table.short for table in self._rope.values()), default=math.inf)

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's names of what an adapter can replace, and its size as stored there."""
        small = {n: stored for n, stored in self.layout.tensors.items() if n in self.tensors and n != "positions"}
        found = {stored: tuple(self.tensors[n].shape) for n, stored in small.items()}
        for group in self.groups.values():
            for part in group.parts:
                size = (part.stop - part.start, group.frozen.in_features)
                found[f"{part.path}.weight"] = size[::-1] if group.transposed else size
                found[f"{part.path}.bias"] = size[:1]
        found[f"{self.layout.embed_path}.weight"] = tuple(self.embed.shape)
        return found

    def check(self, bank: Bank) -> None:
        """Refuse replaced tensors that no line of this decoder reads, a silent loss of what was trained, or of another size."""
        replaced = [(name, override) for own in bank.overrides for name, override in own.items()]
        if unread := sorted({name for name, _ in replaced} - self._replaceable.keys()):
            raise Unsupported(
                f"the native decoder cannot replace {', '.join(unread)}",
                help="attach the adapter to the transformers model, or check that it was made for this base",
            )
        if misfits := [
            line for name, override in replaced for line in _misfits(name, override, self._replaceable[name])
        ]:
            raise FormatError(
                f"this adapter does not fit the base:\n{listed(misfits)}",
                help="use the base it was made for; where that had tokens added to it, make it with transformers "
                "(resize_token_embeddings, save_pretrained, with the adapter's tokenizer) and load that folder",
            )

    # -- the pass ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        segments: Sequence[Segment],
        bank: Bank = EMPTY,
        cache: Cache | None = None,
        rows: Tensor | None = None,
        *,
        recompute: int = 0,
    ) -> Tensor:
        """Hidden states after the final norm, `[N, hidden]`, or of the given `rows` (sorted indices) only.

        tokens     `[N]` ids, the segments' tokens in order
        segments   which rows are which sequence's and use which adapter of `bank` (-1: none)
        cache      keys and values of earlier positions. Without it every sequence is whole, and invoked adapters (aLoRA) are
                   switched on here; with it the caller cuts the segments
        rows       positions whose hidden state is needed; the last block's MLP runs on those alone
        recompute  the first so many blocks drop their activations and run again in the backward pass
        """
        segments = bank.activated(tokens, segments) if cache is None else segments
        h, state, keep = self._embed(tokens, segments, bank, cache)
        wanted = keep if rows is None else rows if keep is None else keep[rows]
        last = self.config.layers - 1
        stepped = self._steps.run(h, state)
        if stepped is not None:
            return stepped if wanted is None or len(wanted) == len(stepped) else stepped[wanted]
        for layer in range(self.config.layers):
            needed = wanted if layer == last else None
            if layer < recompute and torch.is_grad_enabled():
                h = checkpoint(self._block, h, layer, state, needed, use_reentrant=False, preserve_rng_state=False)
            else:
                h = self._block(h, layer, state, needed)
        spans = state.spans if wanted is None else spans_at(state.spans, wanted)
        return self._norm(h, "final_norm", spans, bank)

    def logits(self, hidden: Tensor, spans: Sequence[Span] | None = None, bank: Bank = EMPTY) -> Tensor:
        """Scores over the vocabulary `[n, vocab]` for hidden states; `spans` says which rows use which adapter of the head."""
        spans = spans or (Span(0, hidden.shape[0], -1),)
        scores = self._project("head", hidden, spans, bank)
        cap = self.config.logit_softcap
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def scores(self, hidden: Tensor, spans: Sequence[Span], bank: Bank) -> Tensor:
        """`logits` in fp32 for choosing tokens, without a gradient. Rounded to bf16 the likeliest tokens would often tie."""
        with torch.no_grad():
            if self._head_is_adapted(spans, bank):
                return self.logits(hidden, spans, bank).float()
            head = self.groups["head"]
            assert isinstance(head.frozen, DenseFrozen)
            found = head.frozen.scores(hidden)
            found = found if head.bias is None else found + head.bias
            cap = self.config.logit_softcap
            return found if cap is None else torch.tanh(found / cap) * cap

    def likeliest(self, hidden: Tensor, spans: Sequence[Span], bank: Bank) -> tuple[list[int], list[float]] | None:
        """Where the first of the largest `scores` of each row is, and that score. None where only all of them can tell."""
        head = self.groups["head"]
        plain = head.bias is None and self.config.logit_softcap is None
        if not plain or not isinstance(head.frozen, DenseFrozen) or self._head_is_adapted(spans, bank):
            return None
        return None if head.frozen.sketch is None else head.frozen.sketch.likeliest(hidden)

    @property
    def sketch_bytes(self) -> int:
        """What `likeliest` has made beside the base so far."""
        sketch = vars(self.groups["head"].frozen).get("sketch")
        return sketch.nbytes if isinstance(sketch, Sketch) else 0

    def loss(self, hidden: Tensor, labels: Tensor, weights: Tensor | None, spans: Sequence[Span], bank: Bank) -> Tensor:
        """Sum over rows of weight * negative log-likelihood of `labels`, fp32. Rows are the labelled ones."""
        if self._head_is_adapted(spans, bank):
            losses = F.cross_entropy(self.logits(hidden, spans, bank).float(), labels, reduction="none")
            return losses.sum() if weights is None else (losses * weights).sum()
        head = self.groups["head"]
        return linear_cross_entropy(
            hidden, self._head_weight(), labels, weights, softcap=self.config.logit_softcap, bias=head.bias
        )

    def nll(self, hidden: Tensor, labels: Tensor, spans: Sequence[Span], bank: Bank) -> Tensor:
        """Negative log-likelihood of each label, fp32 `[n]`, without gradients."""
        with torch.no_grad():
            if self._head_is_adapted(spans, bank):
                return F.cross_entropy(self.logits(hidden, spans, bank).float(), labels, reduction="none")
            head = self.groups["head"]
            return token_nll(hidden, self._head_weight(), labels, softcap=self.config.logit_softcap, bias=head.bias)

    # -- its parts -----------------------------------------------------------------------------------------------------

    def _embed(
        self, tokens: Tensor, segments: Sequence[Segment], bank: Bank, cache: Cache | None
    ) -> tuple[Tensor, Pass, Tensor | None]:
        """Input embeddings with virtual rows in place; `keep` indexes the real rows where there are virtual ones."""
        x = self._embedding_rows(tokens, spans_of(segments), bank)
        if self.config.embed_scale != 1.0:
            x = x * torch.tensor(self.config.embed_scale, dtype=self.dtype)
        pieces: list[Tensor] = []
        keep: list[slice] = []
        spans: list[Segment] = []
        runs: list[Run] = []
        source = target = 0
        for segment in segments:
            first = segment.start == 0 and segment.adapter >= 0
            prompt = bank.prompt_rows(segment.adapter) if first else 0
            prefix = bank.prefix_rows(segment.adapter) if first else 0
            if prompt:
                rows = bank.tokens[segment.adapter]
                assert rows is not None
                pieces.append(rows.rows.to(x.dtype))
            pieces.append(x[source : source + segment.length])
            keep.append(slice(target + prompt, target + prompt + segment.length))
            spans.append(Segment(prompt + segment.length, segment.sequence, segment.adapter))
            if cache is not None and prefix:
                for layer, kv in bank.kv[segment.adapter].items():
                    cache.put_prefix(layer, segment.sequence, kv.key.to(self.dtype), kv.value.to(self.dtype))
            _extend_runs(runs, segment.sequence, segment.start + prefix, prompt + segment.length)
            source += segment.length
            target += prompt + segment.length
        has_virtual = target != source
        if has_virtual:
            x = torch.cat(pieces)
        positions = _positions(runs, self.device)
        if self.config.positions == "learned":
            self._check_length(positions)
            x = x + self.tensors["positions"][positions]
        reach = {segment.sequence: segment.reach for segment in segments}
        ends = [(r.length, max(r.start + r.length, reach[r.sequence])) for r in runs]
        angles = {local: table.at(positions, ends) for local, table in self._rope.items()}
        state = Pass(spans_of(spans), tuple(runs), bank, cache, angles)
        if not has_virtual:
            return x, state, None
        every = torch.arange(target, device=self.device)
        return x, state, torch.cat([every[part] for part in keep])

    def _check_length(self, positions: Tensor) -> None:
        longest = int(positions.max()) + 1 if positions.numel() else 0
        if longest > self.config.max_positions:
            raise Unsupported(
                f"a sequence of {longest} tokens exceeds this base's {self.config.max_positions} learned positions",
                help="shorten it, or set max_length",
            )

    def _embedding_rows(self, tokens: Tensor, spans: Sequence[Span], bank: Bank) -> Tensor:
        name = f"{self.layout.embed_path}.weight"
        x = F.embedding(tokens, self.embed)
        if all(s.index < 0 or (bank.embedding[s.index] is None and name not in bank.overrides[s.index]) for s in spans):
            return x
        pieces: list[Tensor] = []
        for span in spans:
            piece, ids = x[span.start : span.stop], tokens[span.start : span.stop]
            override = bank.overrides[span.index].get(name) if span.index >= 0 else None
            factors = bank.embedding[span.index] if span.index >= 0 else None
            if override is not None and override.rows is None:
                piece = F.embedding(ids, override.value).to(self.dtype)
            elif override is not None and override.rows is not None:
                piece = replace_rows(piece, ids, override.rows, override.value)
            if factors is not None:
                piece = piece + (F.embedding(ids, factors[0].t()) @ factors[1].t()).to(self.dtype)
            pieces.append(piece)
        return torch.cat(pieces)

    def _block(self, h: Tensor, layer: int, state: Pass, needed: Tensor | None) -> Tensor:
        name, spans, bank = f"layers.{layer}", state.spans, state.bank
        mixed = self._attention(h, layer, state)
        if needed is not None:
            h, mixed = h[needed], mixed[needed]
            spans = spans_at(spans, needed)
        attended = self._project(f"{name}.o", mixed, spans, bank)
        if any(bank.sublayers):
            a = self._pre_norm(h, f"{name}.attn_norm", spans, bank)
            attended = with_bottlenecks(attended, a, (layer, "attn_out"), spans, bank)
        if self.config.post_norms:
            attended = self._norm(attended, f"{name}.post_attn_norm", spans, bank)
        parallel = self.config.block == "parallel"
        after = h if parallel else h + attended
        fed = self._mlp(after, name, spans, bank)
        if any(bank.sublayers):
            m = self._pre_norm(after, f"{name}.mlp_norm", spans, bank)
            fed = with_bottlenecks(fed, m, (layer, "mlp_out"), spans, bank)
        if self.config.post_norms:
            fed = self._norm(fed, f"{name}.post_mlp_norm", spans, bank)
        return after + fed + attended if parallel else after + fed

    def _attention(self, h: Tensor, layer: int, state: Pass) -> Tensor:
        """Heads' outputs side by side, `[N, heads * head_dim]`, for the residual stream h."""
        config, name = self.config, f"layers.{layer}"
        qkv = self._project_normed(f"{name}.qkv", h, f"{name}.attn_norm", state.spans, state.bank)
        q, k, v = self._qkv(qkv, layer, state)
        if config.positions == "rope":
            cos, sin = state.angles[config.is_local(layer) and config.local_rope is not None]
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        scale = config.attention_scale or config.head_dim**-0.5
        window, softcap = config.window(layer), config.attention_softcap
        if state.cache is not None:
            out = state.cache.attend(layer, q, k, v, state.runs, scale=scale, window=window, softcap=softcap)
        else:
            lengths = [run.length for run in state.runs]
            prefix = state.prefixes(layer)
            out = attention(q, k, v, lengths, scale=scale, window=window, softcap=softcap, prefix=prefix)
        return out.reshape(out.shape[0], config.heads * config.head_dim)

    def _qkv(self, qkv: Tensor, layer: int, state: Pass) -> tuple[Tensor, Tensor, Tensor]:
        config, rows = self.config, qkv.shape[0]
        if config.qkv_order == "heads":
            heads = qkv.view(rows, config.heads, 3, config.head_dim)
            return heads[:, :, 0].contiguous(), heads[:, :, 1].contiguous(), heads[:, :, 2].contiguous()
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = qkv.split([wide, narrow, narrow], dim=1)
        if config.qk_norm == "full":
            q = self._norm(q, f"layers.{layer}.q_norm", state.spans, state.bank)
            k = self._norm(k, f"layers.{layer}.k_norm", state.spans, state.bank)
        q = q.view(rows, config.heads, config.head_dim)
        k = k.view(rows, config.kv_heads, config.head_dim)
        if config.qk_norm == "head":
            q = self._head_norm(q, f"layers.{layer}.q_norm", state)
            k = self._head_norm(k, f"layers.{layer}.k_norm", state)
        v = v.view(rows, config.kv_heads, config.head_dim)
        if config.positions == "rope" and torch.is_grad_enabled():
            v = v.contiguous()  # q and k become new tensors; a view would keep all three alive for the backward pass
        return q, k, v

    def _head_norm(self, x: Tensor, name: str, state: Pass) -> Tensor:
        rows, heads, dim = x.shape
        spans = [Span(s.start * heads, s.stop * heads, s.index) for s in state.spans]
        return self._norm(x.reshape(rows * heads, dim), name, spans, state.bank).view(rows, heads, dim)

    def _mlp(self, h: Tensor, name: str, spans: Sequence[Span], bank: Bank) -> Tensor:
        up = self._project_normed(f"{name}.up", h, f"{name}.mlp_norm", spans, bank)
        down = f"{name}.down"
        if self.config.gated and self._fuses(down, spans, bank):
            group, packed = self.groups[down], bank.groups.get(down)
            packs, own = packs_of(packed, spans)
            return gated_adapted_linear(up, self.config.activation, group.frozen, group.bias, packs, own)
        if self.config.gated:
            half = up.shape[1] // 2
            hidden = activate(up[:, :half], self.config.activation) * up[:, half:]
        else:
            hidden = activate(up, self.config.activation)
        return self._project(down, hidden, spans, bank)

    def _project_normed(self, name: str, h: Tensor, norm: str, spans: Sequence[Span], bank: Bank) -> Tensor:
        """The group's output for the normed residual stream. A frozen RMSNorm is part of the product, which then keeps only h."""
        config, frozen_norm = self.config, not self._replaced(norm, spans, bank)
        if not (config.pre_norms and config.norm != "layer" and frozen_norm and self._fuses(name, spans, bank)):
            return self._project(name, self._pre_norm(h, norm, spans, bank), spans, bank)
        group = self.groups[name]
        packs, own = packs_of(bank.groups.get(name), spans)
        weight = self.tensors[norm]
        return norm_adapted_linear(
            h, weight, config.norm_eps, group.frozen, group.bias, packs, own, offset=self._norm_offset
        )

    def _fuses(self, name: str, spans: Sequence[Span], bank: Bank) -> bool:
        """Whether one product of the whole group serves all rows: nothing replaced, dropped out or scaled part by part."""
        return name not in bank.split and not bank.dropout and not self._overridden(name, spans, bank)

    def _project(self, name: str, x: Tensor, spans: Sequence[Span], bank: Bank) -> Tensor:
        return project(self.groups[name], x, spans, bank, self._shared(name))

    def _overridden(self, name: str, spans: Sequence[Span], bank: Bank) -> bool:
        return is_overridden(self.groups[name], spans, bank, self._shared(name))

    def _shared(self, name: str) -> str | None:
        """The tensor that a tied head reads."""
        return f"{self.layout.embed_path}.weight" if name == "head" and self.config.tied_head else None

    def _pre_norm(self, h: Tensor, name: str, spans: Sequence[Span], bank: Bank) -> Tensor:
        return self._norm(h, name, spans, bank) if self.config.pre_norms else h

    def _norm(self, x: Tensor, name: str, spans: Sequence[Span], bank: Bank) -> Tensor:
        if not self._replaced(name, spans, bank):
            return self._apply_norm(x, name, {})
        pieces = []
        for s in spans:
            pieces.append(self._apply_norm(x[s.start : s.stop], name, bank.overrides[s.index] if s.index >= 0 else {}))
        return torch.cat(pieces)

    def _replaced(self, norm: str, spans: Sequence[Span], bank: Bank) -> bool:
        """Whether any row's adapter brings a weight or bias of its own for this norm."""
        if not any(bank.overrides):
            return False
        names = [self.layout.tensors[n] for n in (norm, f"{norm}_bias") if n in self.layout.tensors]
        return any(s.index >= 0 and any(n in bank.overrides[s.index] for n in names) for s in spans)

    def _apply_norm(self, x: Tensor, name: str, overrides: Mapping[str, Override]) -> Tensor:
        weight, bias = (self._tensor(n, overrides) for n in (name, f"{name}_bias"))
        assert weight is not None
        if self.config.norm == "layer":
            return layer_norm(x, weight, bias, self.config.norm_eps)
        return rms_norm(x, weight, self.config.norm_eps, offset=self._norm_offset)

    @property
    def _norm_offset(self) -> float:
        """What is added to a stored RMSNorm weight: Gemma stores weight - 1."""
        return 1.0 if self.config.norm == "rms1" else 0.0

    def _tensor(self, name: str, overrides: Mapping[str, Override]) -> Tensor | None:
        """A small tensor by its native name, or what stands in for it."""
        own = overrides.get(self.layout.tensors.get(name, ""))
        return self.tensors.get(name) if own is None else own.value

    def _head_weight(self) -> Tensor:
        frozen = self.groups["head"].frozen
        assert isinstance(frozen, DenseFrozen)
        return frozen.weight

    def _head_is_adapted(self, spans: Sequence[Span], bank: Bank) -> bool:
        packed = bank.groups.get("head")
        touched = packed is not None and any(s.index >= 0 and packed.slot[s.index] >= 0 for s in spans)
        return touched or self._overridden("head", spans, bank)


def _misfits(name: str, override: Override, size: tuple[int, ...]) -> Iterator[str]:
    value, rows = tuple(override.value.shape), override.rows
    if rows is None and value != size:
        yield f"{name} is {list(value)}, the base has {list(size)}"
    if rows is not None and value != (len(rows), *size[1:]):
        yield f"{name} has rows {list(value)}, expected {[len(rows), *size[1:]]}"
    elif rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < size[0]:
        yield f"{name} has rows {int(rows.min())} to {int(rows.max())}, the base has {size[0]}"


def _positions(runs: Sequence[Run], device: torch.device) -> Tensor:
    """The position of every row `[N]`."""
    if all(r.length == 1 for r in runs):
        return torch.tensor([r.start for r in runs], device=device)
    return torch.cat([torch.arange(r.start, r.start + r.length, device=device) for r in runs])


def _extend_runs(runs: list[Run], sequence: int, start: int, length: int) -> None:
    """Append rows to the last run where they continue its sequence, else open a new one."""
    if runs and runs[-1].sequence == sequence and runs[-1].start + runs[-1].length == start:
        runs[-1] = Run(sequence, runs[-1].start, runs[-1].length + length)
    else:
        runs.append(Run(sequence, start, length))
