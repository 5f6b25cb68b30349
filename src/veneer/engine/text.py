"""From tokens to text, as they come: characters are never cut, and a stop string is never shown by halves.

A token may end inside a character, and some tokenizers write a token differently at the start of a text than inside
it. So a token is decoded together with the few before it, and shown when that gives whole characters. Text that could
be the beginning of a stop string is held back until it is clear that it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"
_WAITS = 32
"""Tokens that are held back for the rest of a character. No character is that long: what still looks cut then is no text."""
_REST = 3
"""Of those, the last ones may still be the beginning of a character."""


class TextStream:
    """The text of one answer. `stopped` is the stop string that ended it, if one did."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self.text = ""
        self.stopped: str | None = None
        self._decode = decode
        self._stop = self._stop_now = tuple(stop)
        self._include = include_stop
        self._ids: list[int] = []
        self._start = self._shown_to = 0
        self._held = ""

    @property
    def length(self) -> int:
        """Characters so far, shown or held back; where the next token's text begins, or the character it goes on with."""
        return len(self.text) + len(self._held)

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """One more token; the text that can be shown now. Nothing more comes after `stopped` is set.

        While `may_stop` is false, stop strings are text like any other.
        """
        self._ids.append(token)
        self._stop_now = self._stop if may_stop else ()
        before = self._decode(self._ids[self._start : self._shown_to])
        now = self._decode(self._ids[self._start :])
        end = len(self._ids)
        if len(now) <= len(before) or now.endswith(_HALF):
            if end - self._shown_to < _WAITS:
                return ""
            end = next(cut for cut in range(end - _REST, end + 1) if self._decodes_apart(now, cut))
            now = self._decode(self._ids[self._start : end])
        self._start, self._shown_to = self._shown_to, end
        return self._show(now[len(before) :], self._stop_now)

    def finish(self) -> str:
        """The answer has ended for another reason: whatever was held back is text after all, up to a stop string in it."""
        if self.stopped is not None:
            return ""
        before = self._decode(self._ids[self._start : self._shown_to])
        shown = self._show(self._decode(self._ids[self._start :])[len(before) :], self._stop_now)
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _decodes_apart(self, whole: str, cut: int) -> bool:
        return self._decode(self._ids[self._start : cut]) + self._decode(self._ids[cut:]) == whole

    def _show(self, new: str, stops: tuple[str, ...]) -> str:
        text = self._held + new
        hits = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.stopped = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            shown = text[: at + len(self.stopped)] if self._include else text[:at]
            self._held = ""
        else:
            keep = max((_overlap(text, stop) for stop in stops), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
