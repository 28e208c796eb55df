-- The MDM's database, whole. A change here is a new STATE_VERSION (PRAGMA user_version).
-- Objects are rows of JSON, one table per kind; what can be computed from other rows is not stored.

CREATE TABLE cluster (
    one            INTEGER PRIMARY KEY CHECK (one = 1),
    sequence       INTEGER NOT NULL,   -- commands so far; every commit moves it from n to n + 1, or fails
    cluster_id     BLOB NOT NULL CHECK (length(cluster_id) = 16),
    salt           BLOB NOT NULL CHECK (length(salt) = 3),
    capability_key BLOB NOT NULL CHECK (length(capability_key) = 32),
    api_token      TEXT NOT NULL,
    created_at     TEXT NOT NULL
) STRICT;

CREATE TABLE counters (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL             -- the last number given out; numbers are never given twice
) STRICT;

CREATE TABLE pds        (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE fault_sets (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE pools      (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE sds        (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE sdc        (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE volumes    (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE purges     (id INTEGER PRIMARY KEY, body TEXT NOT NULL) STRICT;

CREATE TABLE segments (
    volume_id INTEGER NOT NULL REFERENCES volumes (id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    segment   INTEGER NOT NULL,
    entries   BLOB NOT NULL,           -- zlib of 12 bytes per chunk (SEGMENT_ENTRY_FORMAT), 1024 chunks but in the last
    PRIMARY KEY (volume_id, segment)
) STRICT;

CREATE TABLE events (
    event_id INTEGER PRIMARY KEY,
    time_us  INTEGER NOT NULL,         -- Unix time, microseconds
    type     TEXT NOT NULL,
    body     TEXT NOT NULL
) STRICT;
