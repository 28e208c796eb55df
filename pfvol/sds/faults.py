"""What this SDS is made to suffer on purpose: whether it fails, until when, and what its disks do.

Owns ``<node directory>/faults.json`` and the filters of ``datapath.disk``, which are this process's. Promises: what was
ordered is durable before it is in force, and outlives the process, as a broken server or disk does; a failure with an
end is over when its time has come, also if nobody ran meanwhile. A file that cannot be read is an error and not health.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

from datapath import disk
from pfvol.errors import ConfigError, InvalidError
from pfvol.faults import DiskDelay, DiskError, Rules, check_fail_seconds
from pfvol.sds.devices import replace_document

FAULTS_FILE: Final = "faults.json"
FAULTS_FORMAT: Final = 1


class Faults:
    """The faults of the SDS in ``directory``; as the file says until it is changed."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FAULTS_FILE
        self.failed = False
        self.until_unix: float | None = None
        self.rules = Rules()
        self.revision = 0
        """Higher with each change: who hears of two knows which is the later."""
        self.corrupted = 0
        """Blocks, since this process started."""
        self._load()
        self._put_in_force()

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_text())
            if document["format"] != FAULTS_FORMAT:
                raise ConfigError(f"{self._path} has format {document['format']!r}: remove it to end all faults")
            until = document["until"]
            self.failed, self.until_unix = bool(document["failed"]), None if until is None else float(until)
            self.rules, self.revision = Rules.from_wire(document["rules"]), int(document["revision"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, InvalidError) as error:
            raise ConfigError(f"{self._path} cannot be read ({error}): remove it to end all faults") from None
        if self.failed and self.seconds_left() == 0.0:
            self.failed, self.until_unix = False, None

    def _change(self, *, failed: bool, until_unix: float | None, rules: Rules) -> None:
        """Saves, then takes over; ConfigError, and nothing has changed, when it cannot be saved."""
        document = {
            "format": FAULTS_FORMAT,
            "revision": self.revision + 1,
            "failed": failed,
            "until": until_unix,
            "rules": rules.to_wire(),
        }
        replace_document(self._path, document)
        self.failed, self.until_unix, self.rules, self.revision = failed, until_unix, rules, self.revision + 1

    def _put_in_force(self) -> None:
        disk.clear()
        for error in self.rules.errors.values():
            disk.inject_error(error.call, error.errno, error.per_million)
        for delay in self.rules.delays.values():
            disk.inject_delay(delay.call, delay.microseconds * 1000)

    def seconds_left(self) -> float | None:
        """Of a failure that ends by itself; None: it does not."""
        return None if self.until_unix is None else max(0.0, self.until_unix - time.time())

    def fail(self, seconds: float | None) -> None:
        if seconds is not None:
            check_fail_seconds(seconds)
        until = None if seconds is None else time.time() + seconds
        self._change(failed=True, until_unix=until, rules=self.rules)

    def recover(self) -> None:
        self._change(failed=False, until_unix=None, rules=self.rules)

    def inject(self, errors: list[DiskError], delays: list[DiskDelay], *, clear: bool) -> None:
        """``clear`` first ends what was injected before."""
        rules = (Rules() if clear else self.rules).with_more(errors, delays)
        self._change(failed=self.failed, until_unix=self.until_unix, rules=rules)
        self._put_in_force()

    def describe(self) -> dict[str, Any]:
        """As the MDM is told."""
        counted = disk.injected()
        return {
            "revision": self.revision,
            "failed": self.failed,
            "until_unix": self.until_unix,
            "rules": self.rules.texts(),
            "errors_injected": sum(failed for failed, _ in counted.values()),
            "delays_injected": sum(delayed for _, delayed in counted.values()),
            "blocks_corrupted": self.corrupted,
        }
