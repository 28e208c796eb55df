"""Which operations of which SDC have been carried out (see opids.pxd)."""

class OperationTable:
    """The table for Python, as the tests drive it."""

    def __init__(self, size_max: int) -> None:
        """``size_max``: bytes of entries (32 each) that it may hold."""
    def note(self, node_id: int, place: int, op_id: int) -> None: ...
    def undo(self, node_id: int, place: int, op_id: int) -> None: ...
    def find(self, node_id: int, place: int, op_id: int, since: int = 0) -> int:
        """0 new, 1 carried out (and noted after serial ``since``), 2 finished: the place has a later one."""
    @property
    def serial(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def forgotten(self) -> int: ...
