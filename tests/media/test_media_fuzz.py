"""Three hundred thousand pictures and films that somebody has damaged, in the decoding processes: no process dies,
hangs, grows or leaves a file. `make fuzz` runs this alone, and FUZZ_DECODES says how many.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from tests.media.film_maker import film
from tests.media.test_media_images import TABLE

from dashinfer_vlm.errors import MediaError
from dashinfer_vlm.media.wire import DecodeJob, Terms
from dashinfer_vlm.media.workers import WorkerPool
from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.processors.videos import Qwen2Video
from dashinfer_vlm.request import ItemKind

NUM_DECODES = int(os.environ.get("FUZZ_DECODES", "300_000"))
FILM_SHARE = 0.1
CRASHES = Path("build/fuzz")
"""Where media are kept that have killed a process."""
NUM_WORKERS = 2
TIMEOUT_S = 60.0
"""Of one decode: they take milliseconds, on a busy machine a few tens of them."""
MOST_GROWTH = 1.1
"""Memory of the processes at the end over what they have once three fifths are done: until then it grows by their
largest media, of which each meets its own. Over the rest a hundred bytes lost by each decode would be seen."""
FILMS = {
    f"{container} {codec}": (container, codec)
    for container, codec in [
        ("mp4", "libx264"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
        ("gif", "gif"),
    ]
}
TERMS = Terms(
    config=ProcessorConfig(video=Qwen2Video(min_pixels=28 * 28, max_pixels=28 * 28 * 16)),
    max_pixels=4_000_000,
    max_video_s=100.0,
)
EXTREMES = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\1", b"\1\0\0\0")


def flip(random: Random, data: bytearray) -> None:
    for _ in range(random.choice((1, 2, 8, 32))):
        data[random.randrange(len(data))] = random.randrange(256)


def flip_in_header(random: Random, data: bytearray) -> None:
    for _ in range(random.choice((1, 2, 4))):
        data[random.randrange(min(len(data), 200))] = random.randrange(256)


def put_extreme(random: Random, data: bytearray) -> None:
    place = random.randrange(len(data))
    data[place : place + 4] = random.choice(EXTREMES)


def cut(random: Random, data: bytearray) -> None:
    del data[random.randrange(1, len(data) + 1) :]


def drop(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data))
    del data[start : start + random.randrange(1, 64)]
    data += b"" if data else b"x"


def repeat(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data))
    part = data[start : start + random.randrange(1, 256)]
    data[start:start] = part * random.choice((1, 3, 50))


CHANGES: tuple[Callable[[Random, bytearray], None], ...] = (flip, flip_in_header, put_extreme, cut, drop, repeat)


def damaged(seed: int) -> Iterator[tuple[ItemKind, bytes]]:
    """Without end; the same ones for a seed."""
    random = Random(seed)
    pictures = [make() for make in TABLE.values()]
    films = [film(12, container=c, codec=codec, size=(56, 28)) for c, codec in FILMS.values()]
    while True:
        kind: ItemKind = "video" if random.random() < FILM_SHARE else "image"
        data = bytearray(random.choice(films if kind == "video" else pictures))
        for _ in range(random.choice((1, 1, 2, 4))):
            random.choice(CHANGES)(random, data)
        yield kind, bytes(data)


class Fuzzing:
    """A pool of processes under damaged media, and what became of these."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0

    async def decode(self, media: Iterator[tuple[ItemKind, bytes]]) -> None:
        for kind, data in media:
            job = DecodeJob(kind=kind, sources=(data,), terms=TERMS, folder="", name="")
            start_s = time.perf_counter()
            try:
                _, features = await self.pool.run(job, TIMEOUT_S)
                features.remove()
                self.outcomes[f"{kind} decoded"] += 1
            except MediaError as error:
                died = "crashes the decoder" in str(error) or "takes longer than" in str(error)
                self.outcomes[f"{kind} {'killed its process' if died else 'refused'}"] += 1
                if died:
                    self._keep(kind, data)
            self.slowest_s = max(self.slowest_s, time.perf_counter() - start_s)

    def memory_bytes(self) -> int:
        """What the processes hold of their own: how libraries are shared out depends on who else has them open."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self.pool.pids]
        return sum(int(status.partition("RssAnon:")[2].split()[0]) << 10 for status in statuses)

    def _keep(self, kind: ItemKind, data: bytes) -> None:
        CRASHES.mkdir(parents=True, exist_ok=True)
        (CRASHES / f"{kind}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
async def test_damaged_media_neither_kill_nor_stop_nor_fill_the_decoding_processes(tmp_path: Path) -> None:
    pool = WorkerPool(NUM_WORKERS, memory_mib=2048, folder=tmp_path)
    fuzzing = Fuzzing(pool)
    media = damaged(seed=0)
    sizes = []
    start_s = time.perf_counter()
    try:
        for _ in range(5):
            batch = islice(media, NUM_DECODES // 5)
            await asyncio.gather(*(fuzzing.decode(batch) for _ in range(NUM_WORKERS)))
            sizes.append(fuzzing.memory_bytes())
    finally:
        await pool.close()
    told = f"{dict(fuzzing.outcomes)} in {time.perf_counter() - start_s:.0f} s, slowest {fuzzing.slowest_s:.1f} s, "
    print(told + f"MiB after each fifth {[size >> 20 for size in sizes]}")  # noqa: T201  the figures of the docs
    assert fuzzing.outcomes.total() == NUM_DECODES // 5 * 5
    assert not [outcome for outcome in fuzzing.outcomes if "killed" in outcome], f"kept in {CRASHES}: {told}"
    assert pool.num_restarts == 0
    assert sizes[-1] < max(sizes[:3]) * MOST_GROWTH, told
    assert os.listdir(tmp_path) == []
