"""A tokenizer as the fields of a .gguf file.

llama.cpp names a byte-level BPE's pre-tokenizer in place of carrying its regular expression, so the expression is recognised
here. One that is not known is refused: text would be cut in other places, and the model would read other tokens, without error.
The surprise: a checkpoint's embedding often has more rows than the tokenizer has tokens; the rest are named and marked unused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from veneer.errors import Unsupported
from veneer.models.pre_tokenizer import name_of
from veneer.models.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
HELP = "merge into a checkpoint and convert it with llama.cpp's convert_hf_to_gguf.py"


def tokenizer_fields(tokenizer: Tokenizer | None, vocab: int) -> dict[str, Any]:
    """The `tokenizer.*` fields for a model with `vocab` embedding rows; without a tokenizer the file says that it has none."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    data = json.loads(tokenizer.fast.to_str())
    if data["model"].get("type") != "BPE" or data["model"].get("byte_fallback"):
        raise Unsupported(
            f"a {data['model'].get('type')} tokenizer with byte fallback is not written to .gguf files", help=HELP
        )
    tokens, kinds = _tokens(data, vocab)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(data),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_space_prefix": False,
    }
    ends = tokenizer.eos_ids
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    if ids["eos"] is None and ends:
        ids["eos"] = ends[0]
    found |= {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    turn = next((e for e in ends if e != ids["eos"]), None)
    if turn is not None:
        found["tokenizer.ggml.eot_token_id"] = turn
    if tokenizer.template is not None:
        found["tokenizer.chat_template"] = tokenizer.template
    return found


def _tokens(data: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Token texts and kinds by id, as many as the embedding has rows."""
    texts = {index: (token, NORMAL) for token, index in data["model"]["vocab"].items()}
    for added in data.get("added_tokens", []):
        texts[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    beyond = [text for index, (text, _) in texts.items() if index >= vocab]
    if beyond:
        raise Unsupported(
            f"the tokenizer has {len(beyond)} tokens beyond the embedding's {vocab} rows", help="`veneer doctor`"
        )
    rows = [texts.get(index, (f"[UNUSED{index}]", UNUSED)) for index in range(vocab)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _pre_tokenizer(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer cuts text before merging."""
    name = name_of(data)
    if name is None:
        raise Unsupported("llama.cpp has no known name for how this tokenizer cuts text", help=HELP)
    return name
