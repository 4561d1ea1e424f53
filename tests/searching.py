"""How long hypothesis searches: for all the examples in `make test-slow`, for a quarter of them in `make test`."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

__all__ = ["BRIEF", "THOROUGH", "register_profiles", "searched"]

BRIEF, THOROUGH = "brief", "thorough"
"""Names for `--hypothesis-profile`."""
_SHARE = 4


def register_profiles() -> None:
    """A time limit for a single example says nothing on a busy machine."""
    settings.register_profile(THOROUGH, max_examples=100, deadline=None)
    settings.register_profile(BRIEF, max_examples=100 // _SHARE, deadline=None)


def searched(num_examples: int, **options: Any) -> settings:
    """`num_examples` when searching thoroughly. What was found once is an `@example`, and is tried at any length."""
    is_thorough = settings.get_current_profile_name() == THOROUGH
    return settings(max_examples=num_examples if is_thorough else -(-num_examples // _SHARE), **options)
