"""The C form of a decoder's blocks, for steps in which every row reads one token. See `block.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from veneer.ops.native.build import library
from veneer.ops.native.few import Place, Rows, Weight
from veneer.ops.native.mixed import Jobs
from veneer.ops.native.rows import SMOOTH
from veneer.ops.threads import team

NORMS = ("attn_norm", "mlp_norm", "post_attn_norm", "post_mlp_norm", "q_norm", "k_norm")
"""Their weights in the order that `block` takes them: before attention and MLP, on their outputs, on q and k."""


class _Piece(ctypes.Structure):
    _fields_ = [("weight", Weight), ("kind", c_int64), ("out", c_int64)]


class _Product(ctypes.Structure):
    _fields_ = [("pieces", POINTER(_Piece)), ("bias", c_void_p), *((name, c_int64) for name in ("count", "in", "out"))]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Product) for name in ("qkv", "o", "up", "down")),
        *((name, c_void_p) for name in NORMS),
        *((name, c_float) for name in ("eps", "scale", "k", "e")),
        *((name, c_int64) for name in ("heads", "kv", "d", "half", "window", "whole", "local")),
    ]


@dataclass(frozen=True)
class Product:
    """A frozen product as the kernel reads it.

    pieces  weights `[out_i, in]` under each other
    bias    `[out]`, bf16, or None
    """

    pieces: tuple[Rows, ...]
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """out, in."""
        return sum(piece.shape[0] for piece in self.pieces), self.pieces[0].shape[1]

    def fits(self) -> bool:
        if self.bias is not None and (self.bias.dtype != torch.bfloat16 or not self.bias.is_contiguous()):
            return False
        return all(piece.fits() for piece in self.pieces) and self.shape[0] % 16 == 0


@dataclass(frozen=True)
class Shape:
    """What a block computes beside its products.

    half   half of the dimensions of a head that turn
    whole  q and k are normed over all heads together, not each head on its own
    local  the second of the angles turns this layer
    """

    eps: float
    scale: float
    activation: str
    heads: int
    kv_heads: int
    head_dim: int
    half: int
    window: int | None
    whole: bool
    local: bool


@dataclass(frozen=True, eq=False)
class Block:
    """A block ready for the kernel. Keeps the tensors alive that it points to."""

    structure: _Block
    kept: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Stack:
    """All blocks of a decoder, and the low-rank updates of some mix of rows: for each block of q|k|v, o, gate|up and down.

    final  RMSNorm weight of the last norm with its offset, fp32
    """

    blocks: tuple[Block, ...]
    updates: tuple[Jobs | None, ...]
    final: Tensor

    @cached_property
    def _pointers(self) -> tuple[ctypes.Array[c_void_p], ctypes.Array[c_void_p]]:
        blocks = (c_void_p * len(self.blocks))(*(ctypes.addressof(block.structure) for block in self.blocks))
        updates = (None if jobs is None else jobs.address for jobs in self.updates)
        return blocks, (c_void_p * len(self.updates))(*updates)

    def run(self, h: Tensor, places: ctypes.Array[Place], angles: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states `[n, hidden]` after all blocks and the final norm, from the residual stream `h`.

        Row i reads a token at places[i]; its keys and values are stored.

        angles  cos and sin, fp32 `[n, half]`, of global and of local layers
        """
        kernels = library()
        assert kernels is not None
        assert h.dtype == torch.bfloat16 and h.is_contiguous() and len(h) == len(places)
        assert all(t.dtype == torch.float32 and t.is_contiguous() and len(t) == len(h) for pair in angles for t in pair)
        y, turns = h.clone(), (c_void_p * 4)(*(t.data_ptr() for pair in angles for t in pair))
        blocks, updates = self._pointers
        if not kernels.decode_blocks(
            blocks, len(self.blocks), places, turns, updates, y.data_ptr(), len(y), self.final.data_ptr(), team()
        ):
            raise MemoryError("no memory for the intermediate rows of a step")
        return y


def block(products: Sequence[Product], norms: Sequence[Tensor | None], shape: Shape) -> Block | None:
    """A block of `products` q|k|v, o, gate|up and down, or None where the kernel does not cover it.

    norms  RMSNorm weights of `NORMS` with their offsets, None where there is no such norm
    """
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    heads = d % 16 == 0 and d <= 256 and group <= 16 and shape.half % 16 == 0
    if library() is None or not heads or shape.activation not in SMOOTH or not all(p.fits() for p in products):
        return None
    k, e = SMOOTH[shape.activation]
    small = [None if norm is None else norm.to(torch.float32).contiguous() for norm in norms]
    pointers = [None if norm is None else norm.data_ptr() for norm in small]
    structure = _Block(
        *(_product(p) for p in products), *pointers, shape.eps, shape.scale, k, e,
        shape.heads, shape.kv_heads, d, shape.half, shape.window or 0, shape.whole,
        shape.local,
    )  # fmt: skip
    return Block(structure, (tuple(products), small))


def _product(product: Product) -> _Product:
    out, wide = product.shape
    pieces = [_Piece(piece.structure, piece.kind, piece.shape[0]) for piece in product.pieces]
    bias = None if product.bias is None else product.bias.data_ptr()
    return _Product((_Piece * len(pieces))(*pieces), bias, len(pieces), wide, out)
