"""The data formats people have, found by their keys, and turned into rows.

| format            | keys                                                    | becomes |
|-------------------|---------------------------------------------------------|---------|
| messages          | messages [{role, content, weight?}], tools?, accepted?  | chat    |
| conversations     | conversations [{from, value, weight?}], system?, tools? | chat    |
| alpaca            | instruction, output, input?, system?, history?          | chat    |
| prompt/completion | prompt, completion                                      | raw     |
| text              | text                                                    | raw     |

Where a row fits several, the one that stands higher wins. Other keys are ignored, and named.

The surprise: OpenAI writes the arguments of a tool call as a string of JSON, while chat templates expect the object and would
quote the string a second time. The string is parsed here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.guess import advice
from veneer.data.records import DECODER, Problems, Record, json_type
from veneer.data.rows import Chat, Raw, Row
from veneer.errors import ConfigError
from veneer.registry import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

MOST_WEIGHT = 1e6
"""A message that counts as much as a million others is a mistake, and weights are summed in fp32."""

Say = Callable[[str], None]
"""Where a converter puts what is wrong with its row."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """The keys of a format, and how a record becomes a row. A converter that said something returns None."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Record, Say], Row | None]


def detect(keys: Collection[str]) -> str | None:
    """The format whose keys these are, or None.

    >>> detect(["instruction", "input", "output", "text"])
    'alpaca'
    """
    return next((name for name, entry in FORMATS.items() if all(key in keys for key in entry.required)), None)


def convert(records: Sequence[Record], name: str, problems: Problems) -> tuple[str, list[Row], tuple[str, ...]]:
    """(format, rows, ignored keys) of a file's records. `name` is a format, or "auto" to find it by the keys.

    The first record with known keys decides. Records with other keys are told together, one problem for each set of keys.
    """
    if name != "auto" and name not in FORMATS:
        raise ConfigError(f"no data format is called '{name}'", help=did_you_mean(name, ["auto", *FORMATS]))
    chosen = name if name != "auto" else next((found for r in records if (found := detect(r.value))), None)
    rows: list[Row] = []
    ignored: dict[str, None] = {}
    strange: dict[tuple[str, ...], list[int]] = {}
    for record in records:
        if chosen is None or any(key not in record.value for key in FORMATS[chosen].required):
            strange.setdefault(tuple(record.value), []).append(record.line)
            continue
        entry = FORMATS[chosen]
        row = entry.convert(record, _sayer(problems, record.line))
        rows += [] if row is None else [row]
        ignored.update(dict.fromkeys(key for key in record.value if key not in (*entry.required, *entry.optional)))
    required = {known: entry.required for known, entry in FORMATS.items()}
    for keys, lines in strange.items():
        what, help = advice(keys, lines, required, chosen, detect(keys))
        problems.add(lines[0], what, help=help)
    return chosen or "", rows, tuple(ignored)


def _sayer(problems: Problems, line: int) -> Say:
    return lambda what: problems.add(line, what)


def messages_row(line: int, messages: Any, tools: Any, say: Say) -> Chat | None:
    """A chat row from OpenAI messages, or None after saying all that is wrong with them."""
    wrong: list[str] = []
    if not isinstance(messages, list) or not messages:
        what = "is empty" if messages == [] else f"is {json_type(messages)}"
        say(f"'messages' {what}, expected a list of {{role, content}}")
        return None
    checked = [_message(message, f"messages[{i}]", wrong.append) for i, message in enumerate(messages)]
    schemas = _tools(tools, wrong.append)
    if not wrong and all(message["role"] != "assistant" for message, _ in checked):
        wrong.append("no message is from the assistant, so there is nothing to learn")
    for what in wrong:
        say(what)
    if wrong:
        return None
    return Chat(line, tuple(message for message, _ in checked), tuple(weight for _, weight in checked), schemas)


def _message(message: Any, where: str, say: Say) -> tuple[Message, float | None]:
    if not isinstance(message, dict):
        say(f"{where} is {json_type(message)}, expected {{role, content}}")
        return {"role": ""}, None
    rest = {key: value for key, value in message.items() if key != "weight"}
    role = rest.get("role")
    if role not in ROLES:
        known = f"known: {', '.join(ROLES)}"
        near = f"write '{SPEAKERS[role]}'" if isinstance(role, str) and role in SPEAKERS else known
        say(f"{where} has no role" if role is None else f"{where} has the role {role!r}; {near}")
    rest["content"] = _content(rest, where, say)
    if rest.get("tool_calls") is not None:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], where, say)
    return rest, _weight(message.get("weight"), role, where, say)


def _content(message: Message, where: str, say: Say) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if not message.get("tool_calls"):
            say(f"{where} has no content")
        return None
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if isinstance(content, list):
        say(f"{where} has content parts other than text; only text can be learned")
    else:
        say(f"{where} has {json_type(content)} as content, expected text")
    return None


def _weight(weight: Any, role: Any, where: str, say: Say) -> float | None:
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MOST_WEIGHT:
        say(f"{where} has the weight {weight!r}, expected a number from 0 to {MOST_WEIGHT:g}")
        return None
    if weight > 0 and role != "assistant":
        say(f"{where} is from '{role}' and has a weight above 0; only the assistant's messages are learned")
    return float(weight)


def _tool_calls(calls: Any, where: str, say: Say) -> Any:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        say(f"{where} has {json_type(calls)} as tool_calls, expected a list of objects")
        return calls
    return [_tool_call(call, where, say) for call in calls]


def _tool_call(call: Message, where: str, say: Say) -> Message:
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    if not isinstance(inner.get("name"), str):
        say(f"{where} has a tool call without a name")
    if isinstance(inner.get("arguments"), str):
        inner = {**inner, "arguments": _parsed(inner["arguments"], f"the arguments of a tool call in {where}", say)}
    return {**call, "function": inner} if inner is not call and "function" in call else inner


def _parsed(text: str, what: str, say: Say) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        say(f"{what} are text that is not JSON")
        return text


def _tools(tools: Any, say: Say) -> tuple[Mapping[str, Any], ...] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools, "'tools'", say)
    if tools is None or tools == "" or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        say(f"'tools' is {json_type(tools)}, expected a list of objects")
        return None
    return tuple(tools)


def _from_messages(record: Record, say: Say) -> Chat | None:
    accepted = record.value.get("accepted") or []
    if not isinstance(accepted, list) or not all(isinstance(text, str) for text in accepted):
        say(f"'accepted' is {json_type(accepted)}, expected a list of texts")
        return None
    row = messages_row(record.line, record.value["messages"], record.value.get("tools"), say)
    return None if row is None else replace(row, accepted=tuple(accepted))


def _from_conversations(record: Record, say: Say) -> Chat | None:
    turns, system = record.value["conversations"], record.value.get("system")
    if not isinstance(turns, list) or not turns:
        what = "is empty" if turns == [] else f"is {json_type(turns)}"
        say(f"'conversations' {what}, expected a list of {{from, value}}")
        return None
    wrong: list[str] = []
    messages = [_turn(turn, f"conversations[{i}]", wrong.append) for i, turn in enumerate(turns)]
    if system is not None and not isinstance(system, str):
        wrong.append(f"'system' is {json_type(system)}, expected text")
    for what in wrong:
        say(what)
    if wrong:
        return None
    if system and messages[0]["role"] == "system":
        say("'system' and a first turn from 'system' say two things; one of them is expected")
        return None
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages_row(record.line, messages, record.value.get("tools"), say)


def _turn(turn: Any, where: str, say: Say) -> Message:
    """One ShareGPT turn as a message. Some files already write role and content inside."""
    if not isinstance(turn, dict):
        say(f"{where} is {json_type(turn)}, expected {{from, value}}")
        return {}
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    extra = {"weight": turn["weight"]} if "weight" in turn else {}
    if not isinstance(value, str):
        say(f"{where} has {json_type(value)} as value, expected text")
    elif speaker == "function_call":
        calls = _parsed(value, f"the function call in {where}", say)
        calls = calls if isinstance(calls, list) else [calls]
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": c} for c in calls],
            **extra,
        }
    elif not isinstance(speaker, str) or speaker not in SPEAKERS:
        say(f"{where} is from {speaker!r}; known: {', '.join(SPEAKERS)}, function_call")
    else:
        return {"role": SPEAKERS[speaker], "content": value, **extra}
    return {}


def _from_alpaca(record: Record, say: Say) -> Chat | None:
    texts = _texts(record, ("instruction", "output"), say, ("input", "system"))
    history = record.value.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not pairs:
        say("'history' is not a list of [instruction, output] pairs")
    if texts is None or not pairs:
        return None
    messages: list[Message] = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
    return messages_row(record.line, messages, record.value.get("tools"), say)


def _from_pair(record: Record, say: Say) -> Raw | None:
    texts = _texts(record, ("prompt", "completion"), say)
    return None if texts is None else Raw(record.line, texts["prompt"], texts["completion"])


def _from_text(record: Record, say: Say) -> Raw | None:
    texts = _texts(record, ("text",), say)
    return None if texts is None else Raw(record.line, "", texts["text"])


def _texts(record: Record, keys: tuple[str, ...], say: Say, optional: tuple[str, ...] = ()) -> dict[str, str] | None:
    """The values of the keys, all text ("" where an optional one is absent or null), or None after saying which are not."""
    given = {key: record.value[key] for key in (*keys, *optional) if key in record.value}
    given = {key: value for key, value in given.items() if key in keys or value is not None}
    wrong = [key for key, value in given.items() if not isinstance(value, str)]
    for key in wrong:
        value = given[key]
        hint = " (a list of messages belongs under 'messages')" if isinstance(value, list) else ""
        say(f"'{key}' is {json_type(value)}, expected text{hint}")
    return None if wrong else {key: given.get(key, "") for key in (*keys, *optional)}


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("tools", "accepted"), _from_messages),
    "conversations": Format(("conversations",), ("system", "tools"), _from_conversations),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools"), _from_alpaca),
    "prompt/completion": Format(("prompt", "completion"), (), _from_pair),
    "text": Format(("text",), (), _from_text),
}
