"""Logs as one JSON object a line: for every answer who asked, what answered (version and content digest), how long."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

requests = logging.getLogger("veneer.requests")


class JsonLines(logging.Formatter):
    """`record.fields` (a dict passed as `extra`) become keys beside time, level and event."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line["logger"] = record.name
        line.update(record.__dict__.get("fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(level: str = "INFO") -> None:
    """Send everything to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("httpx").setLevel(logging.WARNING)


def answered(**fields: Any) -> None:
    """One line for one request."""
    requests.info("request", extra={"fields": fields})
