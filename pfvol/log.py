"""Structured logs of every process: one event name, then key=value, to stderr or a file, as console lines or JSON
lines.

Owns the configuration of structlog and of the standard library's ``logging`` (libraries use it), both set once by
``configure``. A logger may be made at import time, before that. A log that cannot be written (full disk, closed pipe)
is dropped: it never takes a process down. Values under the names of secrets are never written.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger

from pfvol.errors import ConfigError

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
FORMATS = ("console", "json")
SECRET_KEYS = frozenset({"secret", "token", "capability", "capability_key", "proof", "nonce", "authorization"})

Logger = FilteringBoundLogger

_file: TextIO | None = None  # the one that logs go to, when it is ours to close


def get_logger(name: str, **context: Any) -> Logger:
    """A logger whose lines carry ``part=name`` and the context. It follows ``configure`` whenever that is called."""
    return cast(Logger, structlog.get_logger(part=name, **context))


def configure(level: str = "info", format: str = "console", file: Path | None = None) -> None:
    """Sets up logging of this process; later calls replace earlier ones.

    Raises ``ConfigError`` for an unknown level or format, or a file that cannot be opened for appending.
    """
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    if format not in FORMATS:
        raise ConfigError(f"log format {format!r} is not one of {', '.join(FORMATS)}")
    global _file
    stream: TextIO = sys.stderr
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"log file {file} cannot be opened: {error.strerror}") from error
    renderer: structlog.typing.Processor
    if format == "json":
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=file is None and stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_secrets,
    ]
    if format == "json":
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Sink(stream))),
        cache_logger_on_first_use=False,
    )
    if _file is not None:
        _file.close()
    _file = stream if file is not None else None
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, _Forward)]
    root.addHandler(_Forward())
    root.setLevel(max(LEVELS[level], logging.WARNING))


class _Sink:
    """A stream whose failures are swallowed: a full disk must not stop the process that reports it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _Forward(logging.Handler):
    """Sends what libraries log through the standard library into our log."""

    def emit(self, record: logging.LogRecord) -> None:
        get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)


def _without_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in event.keys() & SECRET_KEYS:
        event[key] = "(hidden)"
    return event
