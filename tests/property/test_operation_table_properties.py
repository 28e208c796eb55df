"""What was carried out is known until its SDC uses the place again, or memory is short, which it never exceeds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.opids import OperationTable

NEW, CARRIED_OUT, FINISHED = range(3)
ENTRY_BYTES = 32
nodes, places, numbers = st.integers(0, 2**32 - 1), st.integers(1, 65536), st.integers(1, 2**63 - 1)
operations = st.tuples(st.sampled_from([1, 257, 513, 2**32 - 1]), st.sampled_from([1, 2, 64, 65, 65536]), numbers)


@settings(max_examples=200, deadline=None)
@given(st.lists(operations, max_size=60), operations)
def test_the_newest_operation_of_each_place_is_known(noted, asked):
    table = OperationTable(1 << 30)
    newest: dict[tuple[int, int], int] = {}
    for node_id, place, op_id in noted:
        table.note(node_id, place, op_id)
        newest[node_id, place] = max(newest.get((node_id, place), 0), op_id)
        assert table.find(node_id, place, op_id) == (CARRIED_OUT if newest[node_id, place] == op_id else FINISHED)
    for (node_id, place), op_id in newest.items():
        assert table.find(node_id, place, op_id) == CARRIED_OUT
        assert table.find(node_id, place, op_id, table.serial) == NEW, "its copy was replaced since"
    node_id, place, op_id = asked
    known = newest.get((node_id, place), 0)
    assert table.find(*asked) == (CARRIED_OUT if known == op_id else FINISHED if known > op_id else NEW)
    assert table.forgotten == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(nodes, places, numbers), min_size=1, max_size=200), st.integers(0, 400))
def test_memory_is_bounded_and_the_newest_is_kept_when_there_is_room_for_it(noted, entries):
    table = OperationTable(entries * ENTRY_BYTES)
    for node_id, place, op_id in noted:
        forgotten = table.forgotten
        table.note(node_id, place, op_id)
        assert table.size <= entries * ENTRY_BYTES
        if table.find(node_id, place, op_id) == NEW:
            assert table.forgotten > forgotten


@given(st.sampled_from([0, 65537, 2**64 - 1]), numbers)
def test_an_operation_without_a_place_is_not_kept(place, op_id):
    table = OperationTable(1 << 30)
    table.note(1, place, op_id)
    assert (table.find(1, place, op_id), table.size) == (NEW, 0)


def test_the_most_silent_goes_first():
    table = OperationTable(2 * 64 * ENTRY_BYTES)
    for node_id in (1, 2, 1, 3):
        table.note(node_id, 1, 10)
    assert [table.find(node_id, 1, 10) for node_id in (1, 2, 3)] == [CARRIED_OUT, NEW, CARRIED_OUT]
    assert table.forgotten == 1


def test_a_later_one_stays_later_when_the_numbers_wrap():
    table = OperationTable(1 << 20)
    table.note(1, 1, 2**64 - 5)
    table.note(1, 1, 3)
    assert table.find(1, 1, 2**64 - 5) == FINISHED
