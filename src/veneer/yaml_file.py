"""YAML files of keys and values, as users write them: run files, recipes, the server's keys.

`read` is the one reader. Beside the values it tells the line that each stands on, and it refuses a key that is given twice, of
which plain YAML keeps the last without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from veneer.errors import ConfigError, NotFound

HELP = "close brackets and quotes, and indent with spaces; quote a text that has a colon in it"


def read(path: Path, what: str, help: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file, and "file:line" of each by its dotted path. `what` and `help` are words for errors.

    Raises `NotFound`, and `ConfigError` where it is no YAML, holds no keys and values, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"there is no {what} at {path}", help=help) from error
    except (OSError, UnicodeDecodeError) as error:
        wrong = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise ConfigError(f"{path} cannot be read: {wrong}", help=f"give a {what}, a text file in YAML") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{place} is not YAML: {reason(error)}", help=HELP) from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path} is no {what}: it holds {found}, expected keys and values", help=help)
    origins: dict[str, str] = {}
    _collect(node, "", path.name, origins)
    return values, origins


def reason(error: yaml.YAMLError) -> str:
    """What a parser has to say, on one line."""
    return str(error.problem) if isinstance(error, yaml.MarkedYAMLError) else str(error).replace("\n", " ")


def _collect(node: yaml.Node, path: str, file: str, origins: dict[str, str]) -> None:
    """Note the line of everything below `node` that is no section; a list is noted as a whole."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _collect(item, f"{path}.{i}", file, {})
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        here, line = f"{path}.{key.value}".removeprefix("."), f"{file}:{key.start_mark.line + 1}"
        if key.value in seen:
            raise ConfigError(f"{line}: '{here}' is given twice", help="keep one of the two")
        seen.add(key.value)
        if not isinstance(value, yaml.MappingNode):
            origins[here] = line
        _collect(value, here, file, origins)
