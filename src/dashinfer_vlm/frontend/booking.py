"""What one call holds from its admission to the engine's last word on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dashinfer_vlm.frontend.backlog import Backlog, Load
from dashinfer_vlm.frontend.prompt import Prompt
from dashinfer_vlm.frontend.tenants import Tenant


class Booking:
    """Places, media, and a part of the backlog until the first token; tokens are the tenant's."""

    def __init__(self, prompts: Sequence[Prompt], tenant: Tenant, backlog: Backlog, leave: Callable[[], None]) -> None:
        """`leave` gives the places back. Raises OverloadedError, and holds nothing then."""
        self.tenant = tenant
        self._prompts = prompts
        self._backlog = backlog
        self._leave = leave
        self._load = Load.of(prompts)
        self._waits = True
        backlog.check(self._load)
        backlog.enter(self._load)
        tenant.spend(self._load.tokens)

    def used(self, num_tokens: int) -> None:
        """So many tokens of an answer have come."""
        self.tenant.spend(num_tokens)
        if self._waits:
            self._waits = False
            self._backlog.leave(self._load, served=True)

    def end(self) -> None:
        """Give everything back; called once."""
        if self._waits:
            self._backlog.leave(self._load, served=False)
        for prompt in self._prompts:
            prompt.release()
        self._leave()
