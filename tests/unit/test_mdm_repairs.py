"""Goal: repairs are told of once per SDS and interval, and none is forgotten."""

from __future__ import annotations

from mdm.repairs import INTERVAL_SECONDS, Repaired, Repairs


def counted(repaired: int, unrepairable: int = 0) -> dict[str, int]:
    return {"blocks_repaired": repaired, "blocks_unrepairable": unrepairable}


def test_many_repairs_are_one_event_an_interval() -> None:
    repairs = Repairs()
    assert repairs.news(1, counted(0), 10.0) is None
    assert repairs.news(1, counted(3), 11.0) == Repaired(3, 0)
    assert repairs.news(1, counted(50), 12.0) is None
    assert repairs.news(2, counted(7, 1), 12.0) == Repaired(7, 1)
    assert repairs.news(1, counted(60, 2), 11.0 + INTERVAL_SECONDS) == Repaired(57, 2)
    assert repairs.news(1, counted(60, 2), 11.0 + 3 * INTERVAL_SECONDS) is None


def test_other_counters_are_told_of_in_the_same_way() -> None:
    repairs = Repairs("entries_repaired", "devices_unsure")
    assert repairs.news(1, counted(3, 1) | {"entries_repaired": 2, "devices_unsure": 1}, 0.0) == Repaired(2, 1)


def test_an_sds_that_was_started_anew_counts_from_nothing() -> None:
    repairs = Repairs()
    assert repairs.news(1, counted(9), 0.0) == Repaired(9, 0)
    assert repairs.news(1, counted(2), INTERVAL_SECONDS) == Repaired(2, 0)


def test_what_was_counted_before_the_mdm_started_is_no_news() -> None:
    repairs = Repairs()
    assert repairs.news(1, counted(9, 1), 0.0, known=True) is None
    assert repairs.news(1, counted(9, 2), 1.0, known=True) == Repaired(0, 1)
    assert repairs.news(2, counted(9), 0.0) == Repaired(9, 0)


def test_an_sds_of_another_version_that_counts_none_is_taken() -> None:
    assert Repairs().news(1, {}, 0.0) is None


def test_what_cannot_be_repaired_does_not_wait() -> None:
    repairs = Repairs()
    assert repairs.news(1, counted(3), 0.0) == Repaired(3, 0)
    assert repairs.news(1, counted(4, 1), 1.0) == Repaired(1, 1)
    assert repairs.news(1, counted(4, 2), 2.0) is None
    assert repairs.news(1, counted(4, 2), 1.0 + INTERVAL_SECONDS) == Repaired(0, 1)
