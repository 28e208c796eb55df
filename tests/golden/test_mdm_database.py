"""The MDM's database is a format: its schema and rows stay what this version has written (mdm_database.json).

A difference here means that databases in the field no longer load: raise STATE_VERSION, then write the golden file anew
with ``python -m tests.golden.test_mdm_database``.
"""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from mdm.commands import CreateVolume, DeleteVolume, MapVolume, RegisterSdc
from mdm.store.sqlite import SqliteStore
from pfvol.constants import STATE_VERSION
from tests.support.mdm_world import CHUNK, World, new_cluster

GOLDEN = Path(__file__).with_name("mdm_database.json")


def written(path: Path) -> dict[str, Any]:
    """Schema and rows of a small cluster that has one of everything."""
    with closing(SqliteStore.create(path, new_cluster())) as store:
        world = World(store)
        pd_id = world.pd()
        pool_id = world.pool(pd_id)
        rack = world.fault_set(pd_id, "rack")
        world.sds(pd_id, "sds1", slots=10, fault_set_id=rack)
        world.sds(pd_id, "sds2", slots=10)
        session = world.run(RegisterSdc(name="host"))
        for name in ("vol1", "gone"):
            world.run(CreateVolume(pool_id=pool_id, name=name, size_bytes=2 * CHUNK))
        world.run(MapVolume(volume_id=1, sdc_id=session.sdc_id, access_mode="readOnly", iops_limit=5))
        world.run(DeleteVolume(volume_id=2))
    with closing(sqlite3.connect(path)) as raw:
        tables = dict(raw.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL ORDER BY name"))
        rows = {table: [list(map(_shown, row)) for row in raw.execute(f"SELECT * FROM {table}")] for table in tables}
        pragmas = [raw.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    schema = {name: " ".join(re.sub(r"--.*", "", sql).split()) for name, sql in tables.items()}
    return {"application_id": pragmas[0], "version": pragmas[1], "schema": schema, "rows": rows}


def _shown(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def test_schema_and_rows_are_the_golden_ones(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["version"] == STATE_VERSION
    found = written(tmp_path / "mdm.db")
    # zlib's output may differ between its versions; the maps themselves are looked at below.
    for rows in (golden["rows"], found["rows"]):
        rows["segments"] = [row[:2] for row in rows["segments"]]
    assert found == golden


def test_a_golden_database_loads(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    path = tmp_path / "mdm.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA application_id = {golden['application_id']}")
        raw.execute(f"PRAGMA user_version = {golden['version']}")
        for sql in golden["schema"].values():
            raw.execute(sql)
        for table, rows in golden["rows"].items():
            for row in rows:
                raw.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", _stored(table, row))
        raw.commit()
    with closing(SqliteStore.open(path)) as store:
        state = store.load()
    assert state.volumes[1].mappings[0].read_only
    assert state.maps[1][0].hex() == "010000000100020000000000" + "010000000200010000000000"
    assert state.purges[2].sds_ids == {1, 2}


def _stored(table: str, row: list[Any]) -> list[Any]:
    blobs = {"cluster": (2, 3, 4), "segments": (2,)}.get(table, ())
    return [bytes.fromhex(value) if index in blobs else value for index, value in enumerate(row)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        GOLDEN.write_text(json.dumps(written(Path(directory) / "mdm.db"), indent=1) + "\n", encoding="utf-8")
