"""Names and external ids: what is legal, and how a reference finds its object."""

from __future__ import annotations

import pytest

from mdm.commands import CreateProtectionDomain
from mdm.identity import Kind, external_id, resolve
from pfvol.errors import ConflictError, InvalidError, NotFoundError
from tests.support.mdm_world import World, small_world


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "_x", "x" * 31, "0123456789abcde", "list"])
def test_legal_names(name: str) -> None:
    world = World()
    pd_id = world.pd(name)
    assert resolve(world.state, Kind.PD, name) == pd_id


@pytest.mark.parametrize("name", ["", ".a", "-a", "x" * 32, "a b", "a/b", "ä", "a\n", "0123456789abcdef", "a\0"])
def test_illegal_names(name: str) -> None:
    with pytest.raises(InvalidError, match="cannot name the protection domain"):
        World().run(CreateProtectionDomain(name=name))


def test_external_id_is_kind_salt_and_number() -> None:
    world, pd_id, pool_id = small_world()
    assert external_id(world.state, Kind.PD, pd_id) == "01abcdef00000001"
    assert external_id(world.state, Kind.POOL, pool_id) == "03abcdef00000001"


@pytest.mark.parametrize(
    ("kind", "name"), [(Kind.PD, "default"), (Kind.POOL, "default"), (Kind.SDS, "sds2"), (Kind.VOLUME, "vol1")]
)
def test_name_and_id_find_the_same_object(kind: Kind, name: str) -> None:
    world, _, pool_id = small_world()
    world.volume(pool_id)
    number = resolve(world.state, kind, name)
    assert resolve(world.state, kind, external_id(world.state, kind, number)) == number
    assert resolve(world.state, kind, external_id(world.state, kind, number).upper()) == number


@pytest.mark.parametrize("reference", ["nothing", "", "04abcdef00000001", "01abcdee00000001", "01abcdef00000009"])
def test_unknown_references(reference: str) -> None:
    """Neither an unknown name, nor another kind's id, nor another cluster's, nor a number never given."""
    world, _, _ = small_world()
    with pytest.raises(NotFoundError, match="no protection domain"):
        resolve(world.state, Kind.PD, reference)


def test_a_pool_name_in_two_domains_needs_the_domain() -> None:
    world, pd_id, pool_id = small_world()
    other_pd = world.pd("other")
    other_pool = world.pool(other_pd)
    with pytest.raises(ConflictError, match="default, other"):
        resolve(world.state, Kind.POOL, "default")
    assert resolve(world.state, Kind.POOL, "default", pd_id=pd_id) == pool_id
    assert resolve(world.state, Kind.POOL, "default", pd_id=other_pd) == other_pool
