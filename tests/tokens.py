"""The vocabulary of the random checkpoints (`tools/make_checkpoint.py`); special tokens are in the published order."""

from __future__ import annotations

VOCAB = 4096
"""Tokens of the model; those from `FIRST_SPECIAL + 14` on mean nothing."""
FIRST_SPECIAL = 4000
IM_START, IM_END = FIRST_SPECIAL + 1, FIRST_SPECIAL + 2
MARKS = range(FIRST_SPECIAL + 3, FIRST_SPECIAL + 9)
"""object_ref, box and quad, each with its end."""
VISION_START, VISION_END = FIRST_SPECIAL + 9, FIRST_SPECIAL + 10
IMAGE, VIDEO = FIRST_SPECIAL + 12, FIRST_SPECIAL + 13
END_OF_SPECIAL = FIRST_SPECIAL + 14
