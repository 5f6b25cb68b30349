"""Reading a .gguf file of a native family: its metadata as a config.json, its tensors as the checkpoint's.

llama.cpp stores some families in an order of its own: llama's q and k rows as pairs in place of halves, GPT-NeoX's heads taken
apart, GPT-2's matrices transposed, Gemma's norm weights plus one. All of that is undone here. The surprise: forgetting any of
it loads cleanly and speaks garbage, which is why the tests compare logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import FormatError, Unsupported, VeneerError
from veneer.models.checkpoint import shapes
from veneer.models.config import DecoderConfig
from veneer.models.families import decoder_config, layout
from veneer.models.gguf_file import Container
from veneer.models.pre_tokenizer import Cut, cut_named
from veneer.models.rotary import ATTACH
from veneer.models.tokenizer_import import from_gguf

FAMILY = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gptneox": "gpt_neox",
    "gpt2": "gpt2",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "is_causal": "attention.causal",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
GPT2_KEYS = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
COUNTS = {
    "block_count": True,
    "embedding_length": True,
    "feed_forward_length": True,
    "attention.head_count": True,
    "attention.head_count_kv": False,
    "attention.key_length": False,
    "rope.dimension_count": False,
    "context_length": False,
}
"""Whether a file has to have them; llama.cpp refuses one that doesn't."""
MOST = 1 << 24
AGAIN = "copy or download it again, or give the checkpoint that it was made from"
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
UNSCALED_GEMMA = {46: "gemma2", 62: "gemma3_text"}
"""Layers of the two 27B models, whose attention is scaled by hidden / heads; the file does not say so."""


class GgufFile:
    """One .gguf file. `config` is a config.json, `shapes` and `read` speak the checkpoint's own names and orientation."""

    def __init__(self, path: Path) -> None:
        self._file = Container(path)
        self._tensors = self._file.tensors
        self.arch = str(self._field("general.architecture"))
        if self.arch not in FAMILY:
            raise Unsupported(f"{path} holds a '{self.arch}' model, not one of {', '.join(FAMILY)}", help=ATTACH)
        if (pieces := self._field("split.count", 1)) not in (0, 1):
            raise Unsupported(
                f"{path} is one of {pieces} pieces of a model", help="join them: llama-gguf-split --merge FIRST WHOLE"
            )
        if "token_embd.weight" not in self._tensors:
            raise FormatError(f"{path} has no token embedding", help="is it a whole model, not an adapter or a part?")
        self.family = FAMILY[self.arch]
        self._cut = self._cut_of_text()  # what is not known is refused before gigabytes are converted

    def _field(self, key: str, default: Any = None) -> Any:
        return self._file.fields.get(key, default)

    def _own(self, key: str, default: Any = None) -> Any:
        return self._field(f"{self.arch}.{key}", default)

    def tokenizer_files(self, folder: Path) -> None:
        """Write tokenizer.json and its settings, where the file has a tokenizer."""
        if self._field("tokenizer.ggml.model") not in (None, "none", "no_vocab"):
            begins = (self._field(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "add_space_prefix"))
            from_gguf(self._file.path, folder, self._cut, *begins)

    def _cut_of_text(self) -> Cut | None:
        """How text is cut before merging, where that is a question: for a byte-level BPE."""
        if self._field("tokenizer.ggml.model") != "gpt2":
            return None
        return cut_named(self._field("tokenizer.ggml.pre"), self.arch, str(self._file.path))

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        for key, is_needed in COUNTS.items():
            count = self._own(key)
            if (is_needed or count is not None) and (type(count) is not int or not 1 <= count <= MOST):
                raise FormatError(f"{self._file.path}: {self.arch}.{key} is {count!r}, expected a count", help=AGAIN)
        if self._own("block_count") > len(self._tensors):
            raise FormatError(
                f"{self._file.path} has {len(self._tensors)} tensors, too few for {self._own('block_count')} blocks",
                help=AGAIN,
            )
        try:
            return self._config()
        except VeneerError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise FormatError(
                f"{self._file.path}: what it says of its model cannot be read: {error!r}", help=AGAIN
            ) from error

    def _config(self) -> dict[str, Any]:
        found = {ours: value for ours, key in KEYS.items() if (value := self._own(key)) is not None}
        found["vocab_size"] = int(self._tensors["token_embd.weight"].shape[0])
        found["tie_word_embeddings"] = "output.weight" not in self._tensors
        biased = "blk.0.attn_q.bias" in self._tensors or "blk.0.attn_qkv.bias" in self._tensors
        found |= {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in self._tensors}
        heads = found.get("num_attention_heads", 1)
        head_dim = found.setdefault("head_dim", found.get("hidden_size", 0) // heads)
        found |= self._rope(self._own("rope.dimension_count", head_dim) / head_dim)
        for special in ("bos", "eos", "padding"):
            token = self._field(f"tokenizer.ggml.{special}_token_id")
            if token is not None:
                found[f"{'pad' if special == 'padding' else special}_token_id"] = int(token)
        return {"model_type": self.family, "architectures": [CLASSES[self.family]]} | self._particular(found)

    def _particular(self, found: dict[str, Any]) -> dict[str, Any]:
        """What one family calls differently, or what its files leave out."""
        given = self._own("attention.scale")
        usual = found["head_dim"] ** -0.5
        if given is not None and not self.family.startswith("gemma") and not math.isclose(given, usual, rel_tol=1e-5):
            raise Unsupported(f"{self._file.path} scales attention by {given}, not by {usual:.6g}", help=ATTACH)
        if self.family == "gpt2":
            dropped = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "rope_theta")
            return {GPT2_KEYS.get(k, k): v for k, v in found.items() if k not in dropped}
        if self.family == "gpt_neox":
            found["rotary_pct"] = found.pop("partial_rotary_factor", 1.0)
            found["rotary_emb_base"] = found.pop("rope_theta", 10000.0)
        if self.family in ("gemma2", "gemma3_text"):
            large = UNSCALED_GEMMA.get(found["num_hidden_layers"]) == self.family
            scale = found["hidden_size"] // found["num_attention_heads"] if large else found["head_dim"]
            scale = scale if given is None else given**-2
            found |= {"query_pre_attn_scalar": scale, "hidden_activation": "gelu_pytorch_tanh"}
        pattern = self._own("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            found["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        elif pattern is not None:
            found["sliding_window_pattern"] = int(pattern)
        return found

    def _rope(self, share: float) -> dict[str, Any]:
        """Scaling of rotary positions; llama.cpp stores Llama 3's and LongRoPE's as tensors of divisors."""
        found: dict[str, Any] = {} if share == 1.0 else {"partial_rotary_factor": share}
        factors = {name: self._file.dense(name).flatten().tolist() for name in ROPE_FACTORS if name in self._tensors}
        kind, factor = self._own("rope.scaling.type"), self._own("rope.scaling.factor")
        if "rope_freqs.weight" in factors:
            same = factors["rope_freqs.weight"]
            found["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": same,
                "long_factor": same,
                "attention_factor": 1.0,
            }
        elif "rope_factors_long.weight" in factors:
            found["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": factors["rope_factors_short.weight"],
                "long_factor": factors["rope_factors_long.weight"],
                "attention_factor": self._own("rope.scaling.attn_factor"),
            }
        elif kind not in (None, "none") and factor not in (None, 0.0, 1.0):
            found["rope_scaling"] = {"rope_type": kind, "factor": factor, **self._yarn(kind)}
        return found

    def _yarn(self, kind: str) -> dict[str, float]:
        """What a file says of YaRN beside its factor."""
        if kind != "yarn":
            return {}
        if self._own("rope.scaling.attn_factor", 1.0) != 1.0 or self._own("rope.scaling.yarn_attn_factor", 1.0) != 1.0:
            raise Unsupported(f"{self._file.path} scales YaRN's attention by a factor of its own", help=ATTACH)
        betas = {name: self._own(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        return {name: value for name, value in betas.items() if value is not None}

    @cached_property
    def _names(self) -> dict[str, str]:
        """Checkpoint name -> name in this file, by llama.cpp's own table."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.arch)
        table = get_tensor_name_map(arch, self._own("block_count"))
        found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in self._expected}
        return {name: stored for name, stored in found.items() if stored in self._tensors}

    @cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        return shapes(self._decoder, layout(self._decoder))

    @cached_property
    def _decoder(self) -> DecoderConfig:
        return decoder_config(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, as in the checkpoint; what has no name there keeps llama.cpp's."""
        stored = {name: record.shape for name, record in self._tensors.items()}
        ours = {name: stored.pop(theirs) for name, theirs in self._names.items()}
        transposed = {name for name, restore in self._restore.items() if restore is transpose}
        ours |= {name: ours[name][::-1] for name in transposed & set(ours)}
        return ours | {name: shape for name, shape in stored.items() if name not in ROPE_FACTORS}

    def read(self, name: str) -> Tensor:
        """One tensor in fp32, in the checkpoint's orientation and order."""
        tensor = self._file.dense(self._names[name])
        return self._restore[name](tensor) if name in self._restore else tensor

    @cached_property
    def _restore(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Checkpoint name -> what undoes llama.cpp's order for it."""
        config, where = self._decoder, layout(self._decoder)
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for group in where.groups:
            if group.kind == "conv1d":
                found |= {f"{part.path}.weight": transpose for part in group.parts}
            if group.name.endswith(".qkv") and self.family == "llama":
                for part, heads in zip(group.parts[:2], (config.heads, config.kv_heads), strict=True):
                    undo = partial(pairs_to_halves, heads=heads)
                    found |= {f"{part.path}.weight": undo, f"{part.path}.bias": undo}
            if group.name.endswith(".qkv") and config.qkv_order == "heads":
                undo = partial(thirds_to_heads, heads=config.heads)
                found |= {f"{part.path}.{kind}": undo for part in group.parts for kind in ("weight", "bias")}
        if config.norm == "rms1":
            found |= {name: minus_one for native, name in where.tensors.items() if native != "embed"}
        return found


def transpose(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def minus_one(tensor: Tensor) -> Tensor:
    return tensor - 1.0


def pairs_to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (2i, 2i + 1) pairs to the halves (i, i + dim/2) that rotate-half expects."""
    split = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def thirds_to_heads(tensor: Tensor, heads: int) -> Tensor:
    """Rows from (all q, all k, all v) to GPT-NeoX's (q, k, v) of each head."""
    split = tensor.view(3, heads, -1, *tensor.shape[1:])
    return split.transpose(0, 1).reshape(tensor.shape)
