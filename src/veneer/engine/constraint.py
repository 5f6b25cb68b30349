"""Answers that must follow a grammar: JSON, a JSON schema, a regular expression, a Lark grammar. By llguidance.

A matcher follows one answer and says which tokens may come next. A mask costs some tens of microseconds a token;
compiling a schema costs milliseconds, and happens when the request arrives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from veneer.engine.request import Constraint
from veneer.errors import ConfigError, Unsupported

_ANY_OBJECT = {"type": "object"}
_HELP = "llguidance's documentation lists the JSON schema keywords, regular expressions and Lark grammars that it takes"


class Matcher:
    """One answer under a constraint."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    @property
    def complete(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, size: int) -> npt.NDArray[np.bool_]:
        """`[size]`: which tokens may come next. Ids beyond the tokenizer's vocabulary never may. Unsupported as in `accept`."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        flat = np.unpackbits(words, bitorder="little", count=min(8 * len(words), self._vocab, size)).view(np.bool_)
        return np.pad(flat, (0, size - len(flat)))

    def accept(self, token: int) -> None:
        """The next token of the answer, one of those allowed. Unsupported where following it on is too much work."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            what = self._matcher.get_error().partition("\n")[0]
            raise Unsupported(f"the constraint can't be followed any further: {what}", help="ask with a simpler one")

    def copy(self) -> Matcher:
        """A matcher for another answer under the same constraint, from here on."""
        return Matcher(self._matcher.deep_copy(), self._vocab)


class Grammars:
    """Matchers for one tokenizer.

    tokenizer_json  gives the tokenizer as `tokenizers` writes it; read when a constraint is first asked for
    eos_ids         tokens that end an answer
    """

    def __init__(self, tokenizer_json: Callable[[], str], eos_ids: Sequence[int]) -> None:
        self._json = tokenizer_json
        self._eos = list(eos_ids)
        self._tokenizer: Any = None

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of an answer, or ConfigError with what is wrong with the constraint."""
        import llguidance

        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(self._json(), eos_token=self._eos)
        try:
            grammar = _grammar(llguidance.LLMatcher, constraint)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the {constraint.kind} constraint can't be read: {error}", help=_HELP) from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the {constraint.kind} constraint is refused: {matcher.get_error()}", help=_HELP)
        return Matcher(matcher, self._tokenizer.vocab_size)


def _grammar(compiler: Any, constraint: Constraint) -> str:
    if constraint.kind == "json":
        return str(compiler.grammar_from_json_schema(json.dumps(_ANY_OBJECT)))
    if constraint.kind == "json_schema":
        schema = constraint.value if isinstance(constraint.value, str) else json.dumps(constraint.value)
        return str(compiler.grammar_from_json_schema(schema))
    if not isinstance(constraint.value, str):
        raise Unsupported(f"a {constraint.kind} constraint is a string, not {type(constraint.value).__name__}")
    compile = compiler.grammar_from_regex if constraint.kind == "regex" else compiler.grammar_from_lark
    return str(compile(constraint.value))
