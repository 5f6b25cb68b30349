"""Text to token ids and back, exactly as the checkpoint's own tokenizer does it, without importing transformers.

The surprise: what ends a turn is often not the tokenizer's EOS. `eos_ids` also has the ids of generation_config.json and the
token that the chat template puts after an assistant's message.

tokenizer.json is taken as it is. transformers 5 makes it anew for some classes (LlamaTokenizer with a Prepend normaliser), so
its ids may differ there after special tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.pre_tokenizers import Sequence as Steps

from veneer.errors import DataError, FormatError, Unsupported
from veneer.models.cache import read_json
from veneer.models.chat import ChatTemplate

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MORE_TEMPLATES = "additional_chat_templates"
SPACED = ("GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "CohereTokenizer")
"""Classes of transformers in which `add_prefix_space` of the settings decides, and not tokenizer.json."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, int]:
    """How a byte-level vocabulary (GPT-2's) writes bytes: printable Latin-1 as itself, the others from U+0100 on in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


class Tokenizer:
    """A tokenizer and its chat template. Make one with `Tokenizer.load(folder)`.

    template  the chat template's source, or None
    """

    def __init__(
        self,
        fast: FastTokenizer,
        settings: Mapping[str, Any],
        template: str | None = None,
        generation: Mapping[str, Any] | None = None,
        tool_template: str | None = None,
    ) -> None:
        self._fast = fast
        self._settings = settings
        self._generation = {} if generation is None else generation
        self.template, self._tool_template = template, tool_template

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read tokenizer.json and what stands beside it."""
        try:
            fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise FormatError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        settings = _json(folder / "tokenizer_config.json")
        older = "added_tokens_decoder" not in settings
        if older:
            settings |= _json(folder / "special_tokens_map.json")
        try:
            added = _json(folder / "added_tokens.json") if older else None
            tokens = _stated_tokens(settings, added, fast.get_added_tokens_decoder())
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise FormatError(
                f"a token that is stated beside {folder / 'tokenizer.json'} cannot be read: {error!r}",
                help="in tokenizer_config.json a token is a text, or an object with `content` and flags like `lstrip`",
            ) from error
        _bring(fast, settings, tokens)
        templates = _templates(folder, settings)
        generation = _json(folder / "generation_config.json")
        generation = generation or {"eos_token_id": _json(folder / "config.json").get("eos_token_id")}
        return Tokenizer(fast, settings, templates.get("default"), generation, templates.get("tool_use"))

    def with_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template; what ends a turn follows it."""
        return Tokenizer(self._fast, self._settings, source, self._generation)

    # -- text and ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. With `special` the tokenizer adds what it adds by itself (BOS, for those that do)."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
        return ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` for many texts, in parallel."""
        return [encoding.ids for encoding in self._fast.encode_batch(list(texts), add_special_tokens=special)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as `encode(text)`, and for each the characters `[start, stop)` it stands for, leading spaces included.

        Tokens that share one character (its bytes are split between them) have the same offsets.
        """
        encoding = self._fast.encode(text, add_special_tokens=False)
        exact: list[tuple[int, int]] = []
        reached = 0
        for start, stop in encoding.offsets:
            exact.append((min(start, reached), stop))
            reached = max(reached, stop)
        return encoding.ids, exact

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides which tokens a text becomes."""
        decisive: list[Any] = [self._fast.to_str(), self.template, self.special_tokens]
        decisive += [rare for rare in (self._tool_template, self._fast.encode_special_tokens) if rare]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, index: int) -> str | None:
        """The token with this id, as it is written in the vocabulary."""
        found: str | None = self._fast.id_to_token(index)
        return found

    def bytes_of(self, index: int) -> bytes:
        """What one token stands for inside a text, in UTF-8: with its space, and maybe a part of a character only.

        Decoding it alone would give neither. An id without a token stands for nothing.
        """
        token = self.token(index)
        if token is None or index in self._added:
            return (token or "").encode()
        if "ByteLevel" in self._decoders:
            return bytes(_BYTES[c] for c in token) if _BYTES.keys() >= set(token) else token.encode()
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for kind, step in self._decoders.items():
            if kind == "Metaspace":
                token = token.replace(step["replacement"], " ")
            elif kind == "Replace" and "String" in step["pattern"]:
                token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._fast.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> dict[str, dict[str, Any]]:
        """The decoder's steps by kind."""
        decoder = self._fast.decoder
        whole = {} if decoder is None else json.loads(decoder.__getstate__())
        return {step["type"]: step for step in whole.get("decoders", [whole]) if step}

    def id_of(self, token: str) -> int | None:
        """The id of a token as it is written in the vocabulary."""
        found: int | None = self._fast.token_to_id(token)
        return found

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. The model's embedding may have more rows."""
        size: int = self._fast.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def fast(self) -> FastTokenizer:
        """The tokenizer of the `tokenizers` library underneath."""
        return self._fast

    # -- special tokens ------------------------------------------------------------------------------------------------

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as text, those that are set, and what else the checkpoint names (image_token)."""
        found = {name: _content(stated) for name, stated in _named(self._settings).items()}
        return {name: token for name, token in found.items() if token is not None}

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.id_of(token)

    @cached_property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """The id that ends a raw text."""
        return self._special_id("eos_token")

    @cached_property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode(text, special=True)` begins with BOS."""
        return self.bos_id is not None and self.encode("a", special=True)[:1] == [self.bos_id]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: the tokenizer's EOS, generation_config.json's, and the template's end of turn."""
        stated = self._generation.get("eos_token_id")
        ids = [self.eos_id, *(stated if isinstance(stated, list) else [stated]), self._end_of_turn]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The special token that the template puts right after what the assistant says."""
        if self.template is None:
            return None
        said = "veneer"
        try:
            text = self.render([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
        except DataError:  # a template that wants more than this; what it says of real messages is said when they come
            return None
        _, found, after = text.rpartition(said)
        rest = self.encode(after) if found else []
        special = {i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        return rest[0] if rest and rest[0] in special else None

    # -- chat ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _chat(self) -> ChatTemplate:
        if self.template is None:
            raise Unsupported(
                "this base has no chat template, so messages cannot be turned into text",
                help="use prompt/completion or text data, or put a chat_template.jinja beside its tokenizer",
            )
        return ChatTemplate(self.template, self.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, by the checkpoint's template. Further `variables` are handed to the template."""
        template = None if tools is None else self._tool_template
        chat = self._chat if template is None else ChatTemplate(template, self.special_tokens)
        return chat.render(messages, tools, add_generation_prompt, variables)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token's text: stored as a string, or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: files of their own, else in the settings; most checkpoints have "default" only."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    found = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    if found:
        return found
    stated = settings.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(stated, list):
        return {entry["name"]: entry["template"] for entry in stated}
    return {} if stated is None else {"default": stated}


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens with a name, as stated (text or object): bos_token, eos_token, ..., then those of the checkpoint's own."""
    extra = settings.get("extra_special_tokens")
    stated = dict.fromkeys(SPECIAL) | {name: value for name, value in settings.items() if name.endswith("_token")}
    stated |= extra if isinstance(extra, dict) else {}
    return {name: value for name, value in stated.items() if isinstance(value, str | dict)}


def _stated_tokens(
    settings: Mapping[str, Any], older: Mapping[str, int] | None, present: Mapping[int, AddedToken]
) -> list[AddedToken]:
    """Every token that the folder states, with its flags. New ones get the next ids in this order.

    Where a list has a token, its flags count; one that is only named (`eos_token`, `additional_special_tokens`) comes after.

    older    added_tokens.json, where the settings have no `added_tokens_decoder`; then `present` is such a list as well
    present  the tokens of tokenizer.json
    """
    extra = settings.get("extra_special_tokens")
    extra = extra if extra and isinstance(extra, list) else settings.get("additional_special_tokens") or []
    named, more = [_token(stated) for stated in _named(settings).values()], [_token(stated) for stated in extra]
    if older is None:
        entries = settings["added_tokens_decoder"] or {}
        listed = {int(index): _token(entry, special=False) for index, entry in entries.items()}
    else:
        special = {token.content for token in (*named, *more)}
        listed = {index: _token(text, special=text in special) for text, index in older.items()} | {**present}
    tokens = [listed[index] for index in sorted(listed)]
    known = {token.content for token in (*tokens, *present.values())}
    tokens += [token for token in dict.fromkeys((*named, *more)) if token.content not in known]
    names = {token.content for token in named}
    for token in tokens:
        token.special = token.special or token.content in names
    return tokens


def _token(stated: str | Mapping[str, Any], special: bool = True) -> AddedToken:
    """A token as it is stated: its text, or an object with `content` and flags. `special` where the object does not say it."""
    flags = {"content": stated} if isinstance(stated, str) else {**stated}
    flags.pop("__type", None)
    return AddedToken(flags.pop("content"), **{"special": special, **flags})


def _bring(fast: FastTokenizer, settings: Mapping[str, Any], tokens: Sequence[AddedToken]) -> None:
    """Bring tokenizer.json to what the folder states: `tokens`, whether special ones are split, the space before a text."""
    fast.add_tokens(list(tokens))  # those that it has get the flags stated
    fast.encode_special_tokens = bool(settings.get("split_special_tokens"))
    spaced, kind = settings.get("add_prefix_space"), settings.get("tokenizer_class") or ""
    if isinstance(spaced, bool) and kind.removesuffix("Fast") in SPACED:
        steps: Any = fast.pre_tokenizer
        if not isinstance(steps, Steps):
            steps = [steps]
        for step in steps:
            if isinstance(step, ByteLevel):
                step.add_prefix_space = spaced
