"""How a byte-level BPE cuts text before it merges: llama.cpp's name for it in a .gguf file, and its steps in a tokenizer.json.

A .gguf file names the way of cutting in place of carrying it. The surprise: a wrong one loads and speaks well, only that numbers,
contractions and line ends become other tokens than those the model was trained on. So a name that is not in the table is refused.
Names and regular expressions are those of llama.cpp and of the checkpoints' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import Unsupported
from veneer.registry import did_you_mean

_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s" + _ENDS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class Cut:
    """One way of cutting text.

    pattern        a regular expression in place of GPT-2's
    digits         every digit is cut off first
    ignore_merges  a piece that is a token is taken whole, whatever the merges say
    nfc            text is normalised to NFC first
    adds_bos       texts begin with BOS where the file does not say otherwise
    """

    pattern: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False

    @property
    def steps(self) -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json."""
        level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": self.pattern is None,
        }
        steps: list[dict[str, Any]] = [level]
        if self.pattern is not None:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            steps = [split, level]
        if self.digits:
            steps = [{"type": "Digits", "individual_digits": True}, *steps]
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


CUTS = {
    "gpt-2": Cut(),
    "olmo": Cut(nfc=True),
    "smollm": Cut(digits=True),
    "llama-bpe": Cut(_CL100K % "{1,3}", ignore_merges=True, adds_bos=True),
    "dbrx": Cut(_CL100K % "{1,3}"),
    "qwen2": Cut(_CL100K % "", nfc=True),
    "tekken": Cut(_CASED % ("", "", ""), ignore_merges=True, adds_bos=True),
    "gpt-4o": Cut(_CASED % (_SHORT, _SHORT, "{1,3}")),
}
"""llama.cpp's names for what the native families' tokenizers do."""

SAME_AS = {
    "phi-2": "gpt-2",
    "mellum": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "codeshell": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "smaug-bpe": "dbrx",
    "deepseek-r1-qwen": "qwen2",
    "kormo": "qwen2",
    "megrez": "qwen2",
}
ONLY_ONE = {"qwen2": "qwen2", "qwen3": "qwen2", "gpt2": "gpt-2", "gptneox": "olmo", "olmo2": "dbrx"}
"""Architectures whose models all cut text in one way: for older files, which do not name it."""

DEFAULTS: dict[str | None, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "use_regex": True},
    "Split": {"behavior": "Isolated", "invert": False},
    "Digits": {"individual_digits": False},
}
HELP = "load the checkpoint's folder or hub id instead: its tokenizer.json says how to cut text"


def cut_named(name: str | None, arch: str, where: str) -> Cut:
    """The way that a .gguf file names (`tokenizer.ggml.pre`); a name that is not known here is refused."""
    if name in (None, "", "default"):
        name = ONLY_ONE.get(arch)
    if name is None:
        raise Unsupported(
            f"{where} does not say how its tokenizer cuts text, and '{arch}' models do it in several ways", help=HELP
        )
    cut = CUTS.get(SAME_AS.get(name, name))
    if cut is None:
        near = did_you_mean(name, [*CUTS, *SAME_AS])
        raise Unsupported(f"{where} cuts text in the way '{name}', which is not known here; {near}", help=HELP)
    return cut


def cut_as(tokenizer: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """A tokenizer.json that cuts text in this way."""
    changed = {"pre_tokenizer": cut.steps, "model": tokenizer["model"] | {"ignore_merges": cut.ignore_merges}}
    return dict(tokenizer) | changed | {"normalizer": {"type": "NFC"} if cut.nfc else None}


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how this tokenizer.json cuts text, or None. Of names for one way, the one that fits the rest too."""
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        return None
    rest = (bool(tokenizer["model"].get("ignore_merges")), normalizer == "NFC")
    found = [name for name, cut in CUTS.items() if _plain(cut.steps) == _plain(tokenizer.get("pre_tokenizer"))]
    found.sort(key=lambda name: (CUTS[name].ignore_merges == rest[0], CUTS[name].nfc == rest[1]), reverse=True)
    return found[0] if found else None


def _plain(steps: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps with every field that decides where text is cut."""
    listed = (steps or {}).get("pretokenizers", [steps or {}])
    return [
        {key: value for key, value in (DEFAULTS.get(step.get("type"), {}) | step).items() if key != "trim_offsets"}
        for step in listed
    ]
