"""How much prefill and encoding a step may hold while streams wait for its end, by `--schedule`.

Each rule gives the extra work of a step as a share of its decode, from the requests that are far from decoding, those
that are near, and those that decode: at least one. Fractions are of requests that are partly near.
"""

from __future__ import annotations

from collections.abc import Callable

from dashinfer_vlm.config import ScheduleName

Share = Callable[[float, float, int], float]

DECODE_SLACK = 0.4
"""Extra work of a step when few requests wait. Keeps the 99th percentile gap between tokens below 1.5 times its
undisturbed value, with room for error in the estimates."""
CROWDED_SLACK = 5.0
"""The same when about as many wait as decode, or more: a step is six times as long as its decode then."""
BURST_SLACK = 20.0
"""The same when anybody waits and gaps do not matter: reading the weights for few streams is a twentieth of the time
then. More gains next to nothing."""


def flat_share(num_far: float, num_near: float, num_decoding: int) -> float:
    """Streams go on as if nobody waited, whoever does."""
    return DECODE_SLACK


def fair_share(num_far: float, num_near: float, num_decoding: int) -> float:
    """Each has an equal claim on the machine: that is the ratio of those who wait to those who decode.

    Near ones are as good as decoding for the far ones: they come and go all the time, and the streams' gaps would jump
    with each of them. Where far ones are about as many as others, the machine spends its time on reading weights for
    few streams at once, and everybody is done sooner if the far ones catch up first (docs/log.md has what was
    measured): the share then rises steeply, up to CROWDED_SLACK. Below one half it does not.
    """
    crowd = num_far / (num_decoding + num_near)
    return max(DECODE_SLACK, num_near / num_decoding, crowd, min(4 * crowd**3, CROWDED_SLACK))


def burst_share(num_far: float, num_near: float, num_decoding: int) -> float:
    """Whoever waits catches up, so that all decode together afterwards."""
    return BURST_SLACK if num_far + num_near > 0 else DECODE_SLACK


SHARES: dict[ScheduleName, Share] = {"latency": flat_share, "balanced": fair_share, "throughput": burst_share}
