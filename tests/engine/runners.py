"""The runners that an engine may have, for tests of what holds with every one of them."""

from __future__ import annotations

from dashinfer_vlm.engine.devices import make_runner
from tests.engine.card_runner import make_card_runner
from tests.engine.late_runner import make_late_runner

RUNNERS = {"at once": make_runner, "one step late": make_late_runner, "for cards": make_card_runner}
"""By what they are called in the names of tests; to be put in the place of `engine.make_runner`."""
