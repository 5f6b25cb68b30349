"""Streamed text is the text, whole characters only, and a stop string is never shown, not even by halves."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from veneer.engine.text import TextStream


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def stream(data: bytes, stop: Sequence[str] = (), include: bool = False) -> tuple[list[str], TextStream]:
    text = TextStream(decode, stop, include_stop=include)
    shown = []
    for byte in data:
        shown.append(text.push(byte))
        if text.stopped is not None:
            break
    shown.append(text.finish())
    return shown, text


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text_and_no_character_is_cut(said: str) -> None:
    shown, text = stream(said.encode())
    assert "".join(shown) == text.text == said
    if "\ufffd" not in said:
        assert all("\ufffd" not in piece for piece in shown)


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_answer_ends_at_the_first_stop_string(said: str, stop: list[str]) -> None:
    shown, text = stream(said.encode(), stop)
    ends = [at + len(s) for s in stop if (at := said.find(s)) >= 0]
    if not ends:
        assert text.stopped is None
        assert "".join(shown) == said
        return
    assert text.stopped in stop
    seen = said[: min(ends)]
    assert "".join(shown) == text.text
    assert said.startswith(text.text + text.stopped)
    assert len(text.text) <= len(seen)
    assert not any(s in text.text for s in stop)


def test_a_possible_stop_string_is_held_back_until_it_is_clear() -> None:
    text = TextStream(decode, ("</s>",))
    assert [text.push(b) for b in b"a</"] == ["a", "", ""]
    assert text.push(ord("x")) == "</x"
    assert [text.push(b) for b in b"</s>"] == ["", "", "", ""]
    assert text.stopped == "</s>"
    assert text.text == "a</x"


def test_the_stop_string_can_be_part_of_the_answer() -> None:
    _, text = stream(b"one. two", (".",), include=True)
    assert text.text == "one."


def test_stop_strings_do_not_count_before_the_minimum() -> None:
    text = TextStream(decode, (".",))
    assert text.push(ord("."), may_stop=False) == "."
    assert text.stopped is None
    text.push(ord("."))
    assert text.stopped == "."


def test_half_a_character_at_the_end_is_shown_as_one_replacement() -> None:
    shown, _ = stream("é".encode()[:1])
    assert shown == ["", "\ufffd"]


def test_what_never_becomes_a_character_is_shown_and_costs_the_same_for_every_token() -> None:
    most = 0

    def counting(ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return decode(ids)

    text = TextStream(counting)
    shown = "".join(text.push(0xFF) for _ in range(500))
    assert len(shown) > 460 and set(shown) == {"\ufffd"} and most < 100
    assert text.push(ord("a")).endswith("a") and text.text == "\ufffd" * 500 + "a"


@given(st.text(max_size=8), st.integers(1, 200), st.text(max_size=8))
def test_text_after_what_is_none_is_whole_again(before: str, noise: int, after: str) -> None:
    shown, text = stream(before.encode() + b"\xff" * noise + after.encode())
    assert "".join(shown) == text.text == before + "\ufffd" * noise + after


def test_a_stop_string_that_only_the_cut_off_end_completes_still_stops() -> None:
    """The last token may hold whole characters and half of one: they are held back, and must be looked at in the end."""
    tokens = {0: b"a", 1: b"b\xe2"}

    def whole(ids: Sequence[int]) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")

    text = TextStream(whole, ("ab",))
    assert [text.push(0), text.push(1), text.finish()] == ["", "", ""]
    assert text.stopped == "ab"
    assert text.text == ""
