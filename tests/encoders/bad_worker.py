"""A vision worker that dies over pictures of 255 and refuses batches with a picture of 254; else it is the real one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

import torch

from dashinfer_vlm.encoders.elsewhere.wire import Picture, Start
from dashinfer_vlm.encoders.elsewhere.worker import Encode, load_here, serve


def load(start: Start, wait: Callable[[str], None]) -> Encode:
    encode = load_here(start, wait)

    def encode_badly(pictures: Sequence[Picture], patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        lowest = [int(rows.min()) for rows in patches]
        if 255 in lowest:
            os.kill(os.getpid(), signal.SIGKILL)
        if 254 in lowest:
            raise ValueError("a picture of 254")
        return encode(pictures, patches)

    return encode_badly


if __name__ == "__main__":
    sys.exit(serve(load))
