"""The protocol of two copies has no error within its bounds, and the search finds every mistake that is built in."""

from __future__ import annotations

import pytest

from tests.model.bounds import QUICK, SHOWS
from tests.model.protocol import VARIANTS, Protocol
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
