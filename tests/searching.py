"""How long hypothesis searches: for all the examples in `make test-slow`, for a quarter of them in `make test`."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["BRIEF", "THOROUGH", "register_profiles", "searched"]

BRIEF, THOROUGH = "brief", "thorough"
"""Names for `--hypothesis-profile`."""
_SHARE = 4


def register_profiles() -> None:
    """Times say nothing on a busy machine: neither that of an example nor that of drawing one."""
    for name, num_examples in ((THOROUGH, 100), (BRIEF, 100 // _SHARE)):
        settings.register_profile(
            name, max_examples=num_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )


def searched(num_examples: int, **options: Any) -> settings:
    """`num_examples` when searching thoroughly. What was found once is an `@example`, and is tried at any length."""
    is_thorough = settings.get_current_profile_name() == THOROUGH
    return settings(max_examples=num_examples if is_thorough else -(-num_examples // _SHARE), **options)
