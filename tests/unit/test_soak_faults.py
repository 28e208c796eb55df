"""Goal: what the soak and failover programs do and say is what happened: faults by seed, stalls, logs, verdicts."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest

from tools.demo.hosts import MDM, Shape
from tools.demo.network import Loopback, NetworkError
from tools.soak import clients, failover, faults
from tools.soak.clients import READ, RECORD, TORN, WILL_WRITE, WROTE, Log
from tools.soak.faults import KINDS, Fault, Happened
from tools.soak.history import NEVER, Operation
from tools.soak.world import SoakError

SHAPE = Shape(sds=4, sdcs=2)
MS = 10**6


def test_a_seed_gives_the_same_faults() -> None:
    def drawn(seed: int) -> list[list[Fault]]:
        rng = random.Random(seed)
        return [faults.draw(rng, SHAPE, list(KINDS)) for _ in range(200)]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_all_kinds_come_and_none_outlasts_the_deadline_of_an_io() -> None:
    rng = random.Random(1)
    drawn = [faults.draw(rng, SHAPE, list(KINDS)) for _ in range(2000)]
    assert {fault.kind for some in drawn for fault in some} == set(KINDS)
    assert {len(some) for some in drawn} == set(faults.GROUP_SIZES)
    assert max(faults.schedule(some, rng)[-1][0] for some in drawn) < 40
    hosts = {*SHAPE.nodes, *SHAPE.clients}
    for fault in (fault for some in drawn for fault in some):
        assert set(fault.hosts) | set(fault.others) <= hosts
        assert not set(fault.hosts) & set(fault.others)
        json.dumps(fault.document())


def test_no_group_can_destroy_both_copies_of_a_block() -> None:
    """Goal: what costs a copy comes alone, or with the MDM away; else an IO error would be nobody's fault."""
    rng = random.Random(2)
    drawn = [faults.draw(rng, SHAPE, list(KINDS)) for _ in range(2000)]
    with_disks = [some for some in drawn if any(fault.kind in faults.DISKS for fault in some)]
    assert any(len(some) > 1 for some in with_disks)
    for some in with_disks:
        assert some[0].kind in faults.DISKS
        assert all(fault.hosts == (MDM,) for fault in some[1:])
    assert faults.draw(rng, SHAPE, ["corrupt"])[0].kind == "corrupt"


def test_what_is_ordered_through_the_mdm_is_undone_when_it_is_back() -> None:
    rng = random.Random(3)
    for _ in range(100):
        group = [Fault("eio", ("sds1",), 0.5), Fault("kill-mdm", (MDM,), 3.0), Fault("freeze-mdm", (MDM,), 0.1)]
        planned = faults.schedule(group, rng)
        assert [at for at, *_ in planned] == sorted(at for at, *_ in planned)
        assert planned[0][2:] == (False, group[0])
        assert planned[-1][2:] == (True, group[0])
        assert {(number, undone) for _, number, undone, _ in planned} == {
            (n, u) for n in range(3) for u in (False, True)
        }
        assert all(sum(undone and fault is one for _, _, undone, fault in planned) == 1 for one in group)


@pytest.mark.parametrize(
    ("injected", "forgetful"),
    [
        ([Fault("kill-sds", ("sds1",), 1)], False),
        ([Fault("kill-several", ("sds1", MDM), 1)], False),
        ([Fault("kill-several", ("sds1", "sds2"), 1)], True),
        ([Fault("freeze-several", ("sds1", "sds2"), 1)], False),
        ([Fault("kill-sds", ("sds1",), 1), Fault("freeze-sds", ("sds1",), 1)], False),
        ([Fault("kill-sds", ("sds1",), 1), Fault("freeze-sds", ("sds2",), 1)], True),
        ([Fault("kill-sds", ("sds1",), 1), Fault("kill-mdm", (MDM,), 1)], False),
        ([Fault("kill-mdm", (MDM,), 1), Fault("cut-servers", ("sds1",), 1, ("sds2",))], False),
        ([Fault("kill-sds", ("sds1",), 1), Fault("cut-pair", (MDM,), 1, ("sds2",))], True),
        ([Fault("fail-sds", ("sds1",), 1)], False),
        ([Fault("fail-sds", ("sds1",), 1), Fault("freeze-sds", ("sds2",), 1)], True),
        ([Fault("slow-disk", ("sds1",), 1), Fault("freeze-sds", ("sds2",), 1)], False),
    ],
)
def test_only_a_restart_while_another_is_away_makes_servers_forget(injected: list[Fault], forgetful: bool) -> None:
    assert Happened(injected, 0.0).is_forgetful is forgetful


def logged(path: Path, *records: tuple[int, int, int, int, int, int, int]) -> Log:
    path.write_bytes(b"".join(RECORD.pack(*record) for record in records) + b"half a record")
    log = Log()
    log.read(path)
    return log


def test_a_log_is_read_as_it_was_meant(tmp_path: Path) -> None:
    log = logged(
        tmp_path / "log",
        (WILL_WRITE, 1, 0, 5, 77, 1000 * MS, 0),
        (WROTE, 1, 0, 5, 77, 1000 * MS, 1500 * MS),
        (READ, 1, 0, 5, 77, 2000 * MS, 2001 * MS),
        (WILL_WRITE, 0, 0, 9, 78, 3000 * MS, 0),
        (READ, 0, 5, 9, 0, 3100 * MS, 3200 * MS),
        (WILL_WRITE, 0, 0, 8, 79, 3000 * MS, 0),
        (WROTE, 0, 5, 8, 79, 3000 * MS, 3001 * MS),
        (TORN, 0, 0, 7, 80, 4000 * MS, 4001 * MS),
    )
    assert log.operations[1, 5] == [Operation(2.0, 2.001, 77, False), Operation(1.0, 1.5, 77, True)]
    assert log.operations[0, 9] == [Operation(3.0, NEVER, 78, True)]
    assert log.operations[0, 8] == [Operation(3.0, NEVER, 79, True)]
    assert [line.split(" at ")[0] for line in log.errors] == ["read of volume 0 block 9", "write of volume 0 block 8"]
    assert ["EIO" in line for line in log.errors] == [True, True]
    assert len(log.torn) == 1
    assert log.ended == [1.5, 2.001, 4.001]


def test_a_stall_is_the_longest_time_without_an_io(tmp_path: Path) -> None:
    ends = [100, 110, 120, 900, 910, 920]
    log = logged(tmp_path / "log", *((READ, 0, 0, 1, 0, (end - 5) * MS, end * MS) for end in ends))
    assert log.longest_stall(0.115, 0.95) == pytest.approx(0.78)
    assert log.longest_stall(0.905, 0.925) == pytest.approx(0.01)
    assert log.longest_stall(0.5, 0.6) == pytest.approx(0.1)
    assert log.slowest(0.0, 1.0) == 0.0
    log = logged(tmp_path / "log", (READ, 0, 0, 1, 0, 100 * MS, 1500 * MS))
    assert log.slowest(0.5, 0.6) == pytest.approx(1.4)
    assert log.slowest(2.0, 3.0) == 0.0


def test_runs_of_blocks_are_read_together() -> None:
    assert list(clients._runs([3, 4, 5, 9, 11, 12])) == [range(3, 6), range(9, 10), range(11, 13)]
    assert [len(run) for run in clients._runs(range(40))] == [16, 16, 8]
    assert list(clients._runs([])) == []


def test_fios_words_are_understood() -> None:
    failover.check_fio('note\n{"jobs": [{"error": 0}]}\n', "fio: terminating on signal 15")
    with pytest.raises(SoakError, match="failed"):
        failover.check_fio('{"jobs": [{"error": 5}]}', "")
    with pytest.raises(SoakError, match="verify: bad"):
        failover.check_fio('{"jobs": [{"error": 0}]}', "verify: bad magic header")
    with pytest.raises(SoakError, match="nothing that can be read"):
        failover.check_fio("", "cannot start")


def test_stalls_that_are_too_long_are_named() -> None:
    def problems(*stalls: float, fault: str = "killed") -> list[str]:
        measured = [failover.Measured(fault, "sds1", 0.01, stall, stall, 1.0, 100) for stall in stalls]
        assert len(failover.table(measured)) == (2 if stalls else 1)
        return failover.problems(measured, argparse.Namespace(median_max=1.0, stall_max=3.0, mdm_stall_max=0.1))

    assert problems() == []
    assert problems(0.5, 0.7, 2.9) == []
    assert len(problems(0.5, 0.7, 3.1)) == 1
    assert "median" in problems(0.5, 1.2, 2.9)[0]
    assert problems(2.9, fault="hangs") == []
    assert len(problems(0.2, fault="mdm")) == 1


def test_addresses_of_the_loopback_cannot_be_cut() -> None:
    network = Loopback.make(["mdm", "sds1"])
    assert len(set(network.addresses.values())) == 2
    with pytest.raises(NetworkError, match="namespaces"):
        network.cut("mdm", ["sds1"])
    network.heal()
