"""A shard appends and frees while pool threads commit and sync: what was durable is found again, unchanged."""

import random
import shutil
import threading

from datapath.blockfile import BlockDevice

CLUSTER = bytes(range(16))


def test_commits_and_syncs_race_with_the_shard(tmp_path):
    path = tmp_path / "dev"
    BlockDevice.create(path, cluster_id=CLUSTER, size_bytes=16 << 22)
    device = BlockDevice.open(path)
    device.recover()
    stop = threading.Event()
    problems = []

    def pool(call):
        while not stop.is_set():
            try:
                call()
            except OSError as error:
                problems.append(error)
                return

    threads = [threading.Thread(target=pool, args=[call]) for call in (device.commit, device.sync, device.commit)]
    for thread in threads:
        thread.start()
    rng, slots, seq = random.Random(5), {}, 0
    try:
        for turn in range(300):
            chunk = rng.randrange(24)
            if chunk not in slots and device.free:
                slots[chunk] = device.alloc(1, chunk)
            elif chunk in slots and rng.random() < 0.3:
                device.free_slot(slots.pop(chunk))
            if chunk in slots:
                count = device.intent(1, chunk, slots[chunk])
                if device.journal_durable < count:
                    device.commit()
                assert device.journal_durable >= count
                seq += 1
                device.write_block(slots[chunk], turn % 1024, rng.randbytes(4096), 1, seq)
            if turn % 10 == 9:
                device.checkpoint()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    device.commit()
    shutil.copytree(path, tmp_path / "crash")
    device.close(clean=False)
    again = BlockDevice.open(tmp_path / "crash")
    summary = again.recover()
    assert (summary["lost"], summary["unknown_blocks"]) == ([], 0)
    assert {chunk: slot for slot, _, chunk, _ in again.used_slots()} == slots
    assert again.used + again.free == 16
    assert all(again.verify_slot(slot) == [] for slot in slots.values())
    again.close()
