"""What is wrong with a base's words: tokenizer, chat template, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from veneer.diagnose.finding import Finding
from veneer.errors import VeneerError


class Words(Protocol):
    """What is asked of a tokenizer."""

    template: str | None

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    def encode(self, text: str, special: bool = False) -> list[int]: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str: ...


QUESTION = ({"role": "user", "content": "zebra crossing"},)
ANSWERED = (*QUESTION, {"role": "assistant", "content": "quite striped"})


def base_findings(tokenizer: Words | None, vocab: int) -> list[Finding]:
    """Findings about the words of a base whose embedding has `vocab` rows."""
    if tokenizer is None:
        fix = "put tokenizer.json and tokenizer_config.json in its folder"
        return [
            Finding("note", "base", "it has no tokenizer", "its folder has none", f"{fix} for text; token ids work")
        ]
    found = []
    if tokenizer.vocab_size > vocab:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {vocab} rows"
        cause = "tokens were added without resizing the model, or the tokenizer is another model's"
        found.append(Finding("error", "tokenizer", what, cause, "use the tokenizer that came with the weights"))
    try:
        ends = tokenizer.eos_ids
    except VeneerError as error:
        ends = ()
        found.append(_broken(error))
    if not ends and not found:
        cause = "neither the tokenizer, generation_config.json nor the template names an end token"
        fix = "set eos_token in tokenizer_config.json"
        found.append(Finding("error", "tokenizer", "nothing ends an answer: there is no EOS token", cause, fix))
    if tokenizer.pad_id is not None and tokenizer.pad_id in ends:
        cause = "many checkpoints reuse EOS for padding; tools that mask padding then mask EOS, and models never stop"
        found.append(
            Finding(
                "note", "tokenizer", "the padding token is an end token", cause, "nothing: there is no padding here"
            )
        )
    return found + (_template(tokenizer, ends) if not any(f.where == "chat template" for f in found) else [])


def _broken(error: VeneerError) -> Finding:
    cause = "the template refuses a plain question and answer, or is not valid jinja"
    return Finding("error", "chat template", error.message, cause, error.help or "use the template of the checkpoint")


def _template(tokenizer: Words, ends: Sequence[int]) -> list[Finding]:
    if tokenizer.template is None:
        fix = "use prompt/completion or text data, or put a chat_template.jinja beside the tokenizer"
        return [
            Finding(
                "note", "chat template", "there is none", "a base model without chat training usually has none", fix
            )
        ]
    try:
        asked = tokenizer.render(QUESTION, add_generation_prompt=True)
        whole = tokenizer.render(ANSWERED)
    except VeneerError as error:
        return [_broken(error)]
    found = []
    for text in (QUESTION[0]["content"], ANSWERED[1]["content"]):
        if text not in whole:
            cause = "the template drops or rewrites messages"
            found.append(
                Finding(
                    "error", "chat template", f"a message is not in the text: '{text}'", cause, "use another template"
                )
            )
    if found:
        return found
    after = whole[whole.rindex(ANSWERED[1]["content"]) + len(ANSWERED[1]["content"]) :]
    if not set(tokenizer.encode(after)) & set(ends):
        cause = "the template puts no end token after what the assistant says"
        fix = "add eos_token after the assistant's content, or the model never learns to stop"
        found.append(Finding("warning", "chat template", "an answer has no end token after it", cause, fix))
    if not whole.startswith(asked):
        cause = "the text of the question changes when the answer is there (some templates drop earlier reasoning)"
        fix = "training masks by rendering step by step, which copes; check `veneer train`'s preview of one row"
        found.append(Finding("note", "chat template", "the prompt is not the beginning of the whole", cause, fix))
    return found
