"""Every kind of item that a request may hold, each with the one entry that knows it."""

from __future__ import annotations

from collections.abc import Mapping

from dashinfer_vlm.media.images import Images
from dashinfer_vlm.media.medium import Medium
from dashinfer_vlm.media.videos import Videos
from dashinfer_vlm.request import ItemKind

MEDIA: Mapping[ItemKind, Medium] = {medium.kind: medium for medium in (Images(), Videos())}
