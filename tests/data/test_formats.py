"""The five formats, what they become, and what is said about rows that are almost one of them."""

from __future__ import annotations

from typing import Any

import pytest

from veneer import data
from veneer.data.guess import nearest
from veneer.errors import ConfigError, DataError

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def messages(record: dict[str, Any]) -> list[tuple[str, Any]]:
    row = data.from_records([record])[0]
    assert isinstance(row, data.Chat)
    return [(message["role"], message["content"]) for message in row.messages]


def problem(record: dict[str, Any], format: str = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        data.from_records([record], format)
    return caught.value


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": TALK}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations"),
        ({"instruction": "q", "input": "", "output": "a", "text": "whole"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt/completion"),
        ({"text": "t", "meta": {"id": 1}}, "text"),
        ({"prompt": "q", "completion": "a", "messages": TALK}, "messages"),
    ],
)
def test_formats_are_found_by_their_keys(record: dict[str, Any], format: str) -> None:
    assert data.from_records([record]).format == format


def test_sharegpt_becomes_messages() -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny", "weight": 0.5},
    ]
    row = data.from_records([{"conversations": turns, "system": "Be brief", "tools": '[{"name": "f"}]'}])[0]
    assert isinstance(row, data.Chat) and row.tools == ({"name": "f"},) and row.weights == (None, None, None, None, 0.5)
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert messages({"conversations": TALK}) == [("user", "q"), ("assistant", "a")], "role and content inside, too"


def test_alpaca_becomes_messages() -> None:
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Calculate", "history": [["Hi", "Hello"]]}
    assert messages(record) == [
        ("system", "Calculate"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_an_optional_text_may_be_null() -> None:
    record = {"instruction": "Add", "input": None, "system": None, "output": "3"}
    assert messages(record) == [("user", "Add"), ("assistant", "3")]
    assert "null" in str(problem({"instruction": "Add", "output": None}))


def test_text_parts_are_joined_and_pictures_are_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"messages": [{"role": "user", "content": parts}, TALK[1]]})[0] == ("user", "ab")
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "other than text" in problem({"messages": [{"role": "user", "content": picture}, TALK[1]]}).message


def test_arguments_of_tool_calls_are_parsed() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = data.from_records([{"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}])[0]
    assert isinstance(row, data.Chat)
    assert row.messages[1]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"x": 1}}}]
    call["function"] = {"name": "f", "arguments": "{x"}
    assert "not JSON" in problem({"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}]}).message
    assert "without a name" in problem({"messages": [TALK[0], {"role": "assistant", "tool_calls": [{}]}]}).message
    assert "tool_calls" in problem({"messages": [TALK[0], {"role": "assistant", "tool_calls": "f"}]}).message


def test_accepted_answers_are_kept() -> None:
    row = data.from_records([{"messages": TALK, "accepted": ["b"]}])[0]
    assert isinstance(row, data.Chat) and row.accepted == ("b",)
    assert "'accepted'" in problem({"messages": TALK, "accepted": "b"}).message


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hi"}, "'messages' is text"),
        ({"messages": ["hi"]}, "messages[0] is text"),
        ({"messages": [{"content": "x"}, TALK[1]]}, "messages[0] has no role"),
        ({"messages": [{"role": "human", "content": "x"}, TALK[1]]}, "write 'user'"),
        ({"messages": [{"role": ["user"], "content": "x"}, TALK[1]]}, "known: system"),
        ({"messages": [{"role": "user"}, TALK[1]]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": 3}, TALK[1]]}, "number as content"),
        ({"messages": TALK[:1]}, "no message is from the assistant"),
        ({"messages": [TALK[0], {**TALK[1], "weight": -1}]}, "weight -1"),
        ({"messages": [TALK[0], {**TALK[1], "weight": True}]}, "weight True"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 1e39}]}, "weight 1e+39, expected a number from 0 to 1e+06"),
        ({"conversations": [{"from": "system", "value": "a"}, *TALK], "system": "b"}, "say two things"),
        ({"messages": [{**TALK[0], "weight": 1}, TALK[1]]}, "only the assistant's messages are learned"),
        ({"messages": TALK, "tools": "nothing"}, "not JSON"),
        ({"messages": TALK, "tools": {"a": 1}}, "'tools' is object"),
        ({"conversations": {}}, "'conversations' is object"),
        ({"conversations": ["x"]}, "conversations[0] is text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien'"),
        ({"conversations": [{"from": "human", "value": None}]}, "null as value"),
        ({"conversations": [{"from": "human", "value": "x"}], "system": 1}, "'system' is number"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history'"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' is list"),
        ({"prompt": TALK, "completion": "b"}, "belongs under 'messages'"),
        ({"text": None}, "'text' is null"),
    ],
)
def test_wrong_values_are_named(record: dict[str, Any], word: str) -> None:
    assert word in problem(record).message


def test_wrong_keys_name_the_nearest_format_and_the_command() -> None:
    error = problem({"question": "q", "Answer": "a", "id": 1})
    assert "question, Answer, id" in error.message and "'prompt/completion'" in error.message
    assert "'question' to 'prompt' and 'Answer' to 'completion'" in error.message
    assert "jq -c '{prompt: .question, completion: .Answer}'" in str(error.help)
    assert "rename 'mesages' to 'messages'" in problem({"mesages": TALK}).message
    assert "'response' to 'output'" in problem({"instruction": "a", "response": "b"}).message
    assert "known: messages" in str(problem({"x": 1}).help)
    assert "empty object" in problem({}).message
    assert nearest(["x"], {"text": ("text",)}) == (None, {})


def test_a_second_format_in_one_file_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        data.from_records([{"messages": TALK}, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}])
    assert "row 2: found the keys prompt, completion (and 1 more like it)" in caught.value.message
    assert "read as 'messages'" in caught.value.message and "format: prompt/completion" in str(caught.value.help)


def test_a_format_that_was_asked_for_must_fit() -> None:
    assert "format 'alpaca' needs 'instruction' and 'output'" in problem({"x": "a"}, "alpaca").message
    with pytest.raises(ConfigError, match="sharegtp"):
        data.from_records([{"text": "a"}], "sharegtp")


def test_detect() -> None:
    assert data.detect(["text"]) == "text" and data.detect(["x"]) is None
