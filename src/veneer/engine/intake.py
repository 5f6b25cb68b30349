"""From a request to something that can run: tokens, adapters by content, compiled constraints. Everything that can be refused is.

This is the part of the work that needs no turn on the step path: the server does it on its own threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from veneer.engine.constraint import Grammars, Matcher
from veneer.engine.request import Message, Request
from veneer.engine.source import Found, Recipe
from veneer.errors import ConfigError, Unsupported
from veneer.models.tokenizer import Tokenizer

_TEMPLATES = 64
"""Chat templates of adapters that are kept compiled."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request that has been read and can be let in.

    `limit` is None where the answer may go to the end of the context.
    """

    request: Request
    tokens: tuple[int, ...]
    limit: int | None
    recipe: Recipe
    matcher: Matcher | None
    ending: frozenset[int]

    def most(self, answer: int, context: int) -> int:
        """Most tokens of the answer; one without a limit of its own is cut to `answer` tokens and to the room there is."""
        if self.limit is not None:
            return self.limit
        asked = self.request
        limit = min(answer, context - len(self.tokens), answer if asked.up_to is None else asked.up_to)
        if asked.min_tokens > limit:
            raise ConfigError(
                f"min_tokens is {asked.min_tokens:,} and this answer may have {limit:,} tokens",
                help="ask for fewer, or name a max_tokens",
            )
        return limit


class Intake:
    """Reads requests for one base. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, context: int, resolve: Callable[[str], Found]) -> None:
        self._tokenizer = tokenizer
        self._vocab, self._context = vocab, context
        self._resolve = resolve
        self._spellers: dict[str, Tokenizer] = {}
        self._grammars = Grammars(tokenizer.fast.to_str, tokenizer.eos_ids) if tokenizer is not None else None

    def read(self, request: Request) -> Ticket:
        """A ticket for `request`, or the reason why it can't run here."""
        recipe = Recipe.of([(self._resolve(use.name), use.scale) for use in request.uses])
        speller = self._chat_speller(recipe) if _is_chat(request.prompt) else self._tokenizer
        tokens = self._tokens(request, speller)
        self._check(request, tokens)
        matcher = self._matcher(request)
        eos = () if speller is None or request.ignore_eos else speller.eos_ids
        return Ticket(request, tokens, request.max_tokens, recipe, matcher, frozenset((*eos, *request.stop_tokens)))

    def count(self, text: str) -> int:
        """Tokens of a text as a prompt."""
        return len(self._speller("count tokens").encode(text, special=True))

    def _tokens(self, request: Request, speller: Tokenizer | None) -> tuple[int, ...]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return tuple(self._speller("read a text prompt").encode(prompt, special=True))
        if _is_chat(prompt):
            assert speller is not None
            rendered = speller.render(cast("Sequence[Message]", prompt), add_generation_prompt=True)
            return tuple(speller.encode(rendered))
        return tuple(cast("Sequence[int]", prompt))

    def _chat_speller(self, recipe: Recipe) -> Tokenizer:
        """The tokenizer with the template that the adapters bring, or the base's own."""
        speller, template = self._speller("read chat messages"), recipe.template()
        if template is None or template == speller.template:
            return speller
        if template not in self._spellers:
            if len(self._spellers) >= _TEMPLATES:
                self._spellers.clear()
            self._spellers[template] = speller.with_template(template)
        return self._spellers[template]

    def _check(self, request: Request, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ConfigError("the prompt is empty", help="a prompt needs at least one token")
        for where, ids in (
            ("the prompt", tokens),
            ("stop_token_ids", request.stop_tokens),
            ("logit_bias", request.sampling.logit_bias),
        ):
            stray = next((t for t in ids if not 0 <= t < self._vocab), None)
            if stray is not None:
                raise ConfigError(f"token {stray} of {where} is not in this base's vocabulary of {self._vocab:,}")
        room = self._context - len(tokens)
        if room < 1:
            raise ConfigError(
                f"the prompt has {len(tokens):,} tokens and this base reads {self._context:,}, the answer included",
                help="shorten the prompt",
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise ConfigError(
                f"prompt ({len(tokens):,} tokens) and max_tokens ({request.max_tokens:,}) exceed this base's context "
                f"of {self._context:,} tokens",
                help=f"ask for at most {room:,} tokens, or leave max_tokens out",
            )
        if request.stop:
            self._speller("look for stop strings")

    def _matcher(self, request: Request) -> Matcher | None:
        if request.constraint is None:
            return None
        self._speller("follow a constraint")
        assert self._grammars is not None
        return self._grammars.matcher(request.constraint)

    def _speller(self, purpose: str) -> Tokenizer:
        if self._tokenizer is None:
            raise Unsupported(
                f"this base came without a tokenizer, which is needed to {purpose}", help="give the prompt as token ids"
            )
        return self._tokenizer


def _is_chat(prompt: str | Sequence[int] | Sequence[Message]) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def speller_of(tokenizer: Tokenizer | None) -> Callable[[int], bytes]:
    """What one token stands for; nothing without a tokenizer."""
    return (lambda token: b"") if tokenizer is None else tokenizer.bytes_of
