"""The protocol of two copies has no error within its bounds, and the search finds every mistake that is built in."""

from __future__ import annotations

import pytest

from tests.model.bounds import FORCED, QUICK, SHOWS
from tests.model.protocol import NONE, VARIANTS, Protocol, State
from tests.model.search import search

STATES_MAX = 200_000
STATES_MIN = 5_000  # fewer: the bounds do not let anything happen

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("name", QUICK)
def test_the_protocol_has_no_error(name: str) -> None:
    """Goal: in every state within these bounds, clients see one register and equal tags name equal bytes."""
    found = search(Protocol(QUICK[name]), STATES_MAX)
    print(f"{name}: {found}")
    assert found.error == "", str(found)
    assert found.states >= STATES_MIN, str(found)


@pytest.mark.parametrize("name", FORCED)
def test_a_forced_copy_is_the_only_one_from_then_on(name: str) -> None:
    """Goal: after it clients see one register again, whatever the one that had more brings back, and no tag names two
    contents."""
    found = search(Protocol(FORCED[name]), STATES_MAX)
    print(f"{name}: {found}")
    assert found.error == "", str(found)
    assert found.states >= STATES_MIN, str(found)


class UntilBack(Protocol):
    """Stops where the set has a second member again that serves, after all writes were answered."""

    def error(self, s: State) -> str:
        answered = all(client.call == count for client, count in zip(s.clients, self.bounds.writes, strict=True))
        back = s.map.epoch > 1 and s.map.secondary != NONE and s.servers[s.map.secondary].leased
        return "back" if answered and back and s.map.secondary == self.bounds.servers - 1 else ""


@pytest.mark.parametrize("name", ["two clients, out and back in the set", "three servers"])
def test_a_set_becomes_whole_again(name: str) -> None:
    """Goal: the bounds are wide enough for a whole round: out of the set, writes, a copy, in again and serving."""
    found = search(UntilBack(QUICK[name]), STATES_MAX)
    print(f"{name}: {found}")
    assert found.error == "back", str(found)


def test_every_mistake_is_looked_for() -> None:
    """Goal: no variant is left out of the test below."""
    assert set(SHOWS) == set(VARIANTS)


@pytest.mark.parametrize("wrong", VARIANTS)
def test_a_mistake_is_found(wrong: str) -> None:
    """Goal: each rule is needed, and the search would notice if it were gone: the bounds pass with it."""
    assert SHOWS[wrong] in QUICK.values()
    found = search(Protocol(SHOWS[wrong], wrong), STATES_MAX)
    print(f"{wrong}: {found}")
    assert found.error, f"not found in {found}"
