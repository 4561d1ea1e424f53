"""What the requests of one tenant may take together."""

from __future__ import annotations

import pytest

from dashinfer_vlm.errors import RateLimitError
from dashinfer_vlm.frontend.tenants import NOBODY, Tenant, TenantLimits


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ask(tenant: Tenant) -> RateLimitError | None:
    """What a request that is over at once is told."""
    try:
        with tenant.request():
            return None
    except RateLimitError as error:
        return error


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_come_back_evenly_over_the_minute(clock: Clock) -> None:
    tenant = Tenant(TenantLimits(requests_per_minute=6), clock=clock)
    assert [ask(tenant) for _ in range(6)] == [None] * 6
    refused = ask(tenant)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == ("key_requests", 10)
    assert "6 requests per minute; try again in 10 s" in str(refused)
    clock.now_s += 10
    assert ask(tenant) is None
    assert ask(tenant) is not None
    clock.now_s += 600
    assert [ask(tenant) for _ in range(7)].count(None) == 6, "no more than a minute's are ever saved"
    assert (tenant.num_requests_total, tenant.num_refusals_total) == (13, 3)


def test_a_request_may_run_into_debt_which_the_next_one_waits_for(clock: Clock) -> None:
    tenant = Tenant(TenantLimits(tokens_per_minute=600), clock=clock)
    assert ask(tenant) is None
    tenant.spend(900)
    refused = ask(tenant)
    assert refused is not None
    assert (refused.reason, refused.retry_after_s) == ("key_tokens", 31)
    clock.now_s += 31
    assert ask(tenant) is None


def test_so_many_requests_run_at_a_time_and_their_places_come_back(clock: Clock) -> None:
    tenant = Tenant(TenantLimits(max_concurrent=2), clock=clock)

    def fail_in_a_second_one() -> None:
        with tenant.request():
            refused = ask(tenant)
            assert refused is not None
            assert refused.reason == "key_concurrency"
            raise ZeroDivisionError

    with tenant.request():
        with pytest.raises(ZeroDivisionError):
            fail_in_a_second_one()
        assert ask(tenant) is None


def test_new_limits_hold_at_once_and_what_was_used_stays_used(clock: Clock) -> None:
    tenant = Tenant(TenantLimits(requests_per_minute=2), clock=clock)
    assert [ask(tenant) for _ in range(2)] == [None] * 2
    tenant.change(TenantLimits(requests_per_minute=3))
    assert ask(tenant) is None
    assert ask(tenant) is not None
    tenant.change(TenantLimits())
    assert [ask(tenant) for _ in range(100)] == [None] * 100
    tenant.change(TenantLimits(requests_per_minute=1))
    assert [ask(tenant) for _ in range(2)].count(None) == 1


def test_who_has_no_limits_is_never_refused(clock: Clock) -> None:
    clock.now_s += 1
    assert [ask(NOBODY) for _ in range(1000)] == [None] * 1000


def test_a_tenant_alone_shares_with_itself_and_salts_of_neighbours_never_meet() -> None:
    alone = Tenant(id="a")
    assert (alone.salt, alone.salted(""), alone.salted("own")) == ("", "", "own")
    one, two = Tenant(id="a"), Tenant(id="ab")
    one.has_neighbours = two.has_neighbours = True
    salted = [one.salted(""), one.salted("b"), two.salted(""), two.salted("b"), one.salted("ab"), ""]
    assert len(set(salted)) == len(salted)
