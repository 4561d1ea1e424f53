"""The engine process with the scripted engine in it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dashinfer_vlm.engine.host.child import serve
from tests.engine import scripted

sys.exit(serve(scripted.load))
