"""The media room's door: a reference as a client gave it becomes features in shared memory, with nothing done twice.

    URL ──fetch──► encoded bytes ──hash──► decoded? ──no──► decoding process ──► features (leased, cached)

Identity is content: features are found again by the hash of the encoded bytes and the settings, never by a URL.
Concurrent loads of one URL share one fetch, concurrent loads of equal bytes share one decode; a later load of the URL
fetches it again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import anyio
import numpy as np

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.errors import MediaError, MediaRefusedError, MediaTooLargeError, OverloadedError
from dashinfer_vlm.media.cache import ByteBudget, Lease, LeasedCache
from dashinfer_vlm.media.decode import content_hash
from dashinfer_vlm.media.fetch import Fetcher, Resolver, check_size, decode_data_url, read_file
from dashinfer_vlm.media.medium import DEFAULT_LIMITS, MediaLimits, Medium
from dashinfer_vlm.media.policy import MediaPolicy
from dashinfer_vlm.media.registry import MEDIA
from dashinfer_vlm.media.types import LoadedMedia, MediaRef, Source
from dashinfer_vlm.media.wire import DecodeJob, Terms
from dashinfer_vlm.media.workers import WorkerPool
from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.processors.videos import Sampling
from dashinfer_vlm.request import Grid
from dashinfer_vlm.shared_array import SharedArray, SharedFolder

_LARGE_BYTES = 1 << 20
"""What takes longer than some milliseconds to decode or hash is left to a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaCounters:
    """What the room has done since it was opened, but for `cache_bytes`, which is what it holds now."""

    fetches: int = 0
    """GETs of http and https URLs; redirects not counted."""
    fetched_bytes: int = 0
    decodes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes: int = 0
    refusals: int = 0
    failures: int = 0
    """Loads that ended in a MediaError, refusals included."""
    worker_restarts: int = 0


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Bytes as they came, their SHA-256, and how many bytes of the raw budget they occupy."""

    data: bytes
    digest: bytes
    reserved: int


@dataclass(frozen=True, slots=True)
class _Features:
    grid: Grid
    content_hash: bytes
    seconds_per_grid: float
    timestamps: tuple[float, ...]
    array: SharedArray


class MediaLoader:
    """Loads media for one event loop. `close` it, or the decoding processes stay until the program ends."""

    def __init__(
        self,
        config: MediaConfig,
        processor: ProcessorConfig,
        *,
        limits: MediaLimits = DEFAULT_LIMITS,
        resolve: Resolver | None = None,
    ) -> None:
        """Raises ConfigError for a host or folder of `config` that cannot be used. Starts nothing yet."""
        self._processor = processor
        self._limits = limits
        self._config = config
        self._max_pixels = config.max_image_mpx * 1_000_000
        self.max_patches: int | None = None
        """Rows of one item's features that the encoder has memory for; known once the engine is, None until then."""
        self._policy = MediaPolicy(config.allowed_media_domains, config.allowed_local_media_path)
        self._fetcher = Fetcher(self._policy, resolve=resolve)
        self._folder = SharedFolder()
        # Up to four copies of four bytes per pixel exist while transparency is composited; the rest is the program.
        memory_mib = 1024 + config.max_image_mpx * 16
        self._workers = WorkerPool(config.media_workers, memory_mib=memory_mib, folder=self._folder.path)
        largest = max(medium.limits(config, limits).max_bytes for medium in MEDIA.values())
        self._raw_bytes = ByteBudget(max(limits.max_raw_bytes, largest))
        self._fetched = LeasedCache[_Encoded](0, size_of=lambda e: len(e.data), dispose=self._dispose_encoded)
        self._features = LeasedCache[_Features](
            config.media_cache_mib << 20, size_of=lambda p: p.array.nbytes, dispose=lambda p: p.array.remove()
        )
        self._fetches = self._fetched_bytes = self._decodes = self._refusals = self._failures = 0

    @property
    def raw_bytes_free(self) -> int:
        """Room that is left for encoded bytes; the whole budget when nothing is being loaded."""
        return self._raw_bytes.free_bytes

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """The bounds that a reference's own must lie within."""
        return self._processor.min_pixels, self._processor.max_pixels

    @property
    def side_step(self) -> int:
        """Both sides of a resized picture are multiples of so many pixels."""
        return self._processor.factor

    @property
    def counters(self) -> MediaCounters:
        return MediaCounters(
            fetches=self._fetches,
            fetched_bytes=self._fetched_bytes,
            decodes=self._decodes,
            cache_hits=self._features.num_hits,
            cache_misses=self._features.num_misses,
            cache_bytes=self._features.num_bytes,
            refusals=self._refusals,
            failures=self._failures,
            worker_restarts=self._workers.num_restarts,
        )

    async def start(self) -> None:
        """Start the decoding processes ahead of the first load, which otherwise waits for one."""
        await self._workers.start()

    async def close(self) -> None:
        """End processes and connections, remove all features; loads that still run are cancelled."""
        await self._fetched.close()
        await self._features.close()
        await self._workers.close()
        await self._fetcher.close()
        self._folder.close()

    async def load(self, ref: MediaRef) -> LoadedMedia:
        """Fetch, decode and process; the caller must call `release` of the result once.

        Raises MediaError and its kinds, with `param` from the reference, and OverloadedError.
        """
        medium = MEDIA[ref.kind]
        try:
            terms = self._terms(ref)
            lease = await self._load(medium, ref.source, terms)
        except MediaError as error:
            self._failures += 1
            self._refusals += isinstance(error, MediaRefusedError)
            raise type(error)(str(error), param=ref.param) from error
        made = lease.value
        return LoadedMedia(
            kind=ref.kind,
            grid=made.grid,
            num_tokens=medium.num_tokens(made.grid, terms.config),
            content_hash=made.content_hash,
            features=made.array,
            release=lease.release,
            seconds_per_grid=made.seconds_per_grid,
            timestamps=made.timestamps,
        )

    def _terms(self, ref: MediaRef) -> Terms:
        """The settings under the reference's bounds; raises MediaError for those that cannot be."""
        sampling = Sampling(
            fps=ref.fps, num_frames=ref.num_frames, min_frames=ref.min_frames, max_frames=ref.max_frames
        )
        sampling.check(self._processor.video.max_frames)
        config = self._processor.for_request(
            ref.min_pixels, ref.max_pixels, total_pixels=ref.total_pixels, resized=_resized(ref)
        )
        return Terms(
            config=config,
            sampling=sampling,
            max_pixels=self._max_pixels,
            max_video_s=self._limits.max_video_s,
            max_patches=self.max_patches,
        )

    async def _load(self, medium: Medium, source: Source, terms: Terms) -> Lease[_Features]:
        if isinstance(source, np.ndarray):
            return await self._load_array(medium, source, terms)
        if isinstance(source, tuple):
            return await self._load_parts(medium, source, terms)
        limits = medium.limits(self._config, self._limits)
        encoded = await self._encoded(source, limits.max_bytes, limits.fetch_timeout_s)
        try:
            return await self._decoded(medium, (encoded.value,), terms, in_parts=False)
        finally:
            encoded.release()

    async def _load_parts(self, medium: Medium, sources: tuple[str | bytes, ...], terms: Terms) -> Lease[_Features]:
        """The frames of one video. Room for all of them is taken at once: taken one by one, two loads could each
        hold what the other waits for."""
        medium.check_parts(len(sources), terms.config)
        most = medium.limits(self._config, self._limits).max_bytes
        part = medium.part_limits(self._config, self._limits)
        reserved = min(most, sum(_size_hint(source, part.max_bytes) for source in sources))
        await self._reserve(reserved)
        fetches = asyncio.Semaphore(self._limits.num_frame_fetches)

        async def fetch(source: str | bytes) -> Lease[_Encoded]:
            async with fetches:
                return await self._encoded(source, part.max_bytes, part.fetch_timeout_s, reserve=False)

        tasks = [asyncio.create_task(fetch(source)) for source in sources]
        try:
            parts = [lease.value for lease in await asyncio.gather(*tasks)]
            if sum(len(part.data) for part in parts) > most:
                raise MediaTooLargeError(f"the frames are together larger than the limit of {most} bytes")
            return await self._decoded(medium, tuple(parts), terms, in_parts=True)
        finally:
            await _release_all(tasks)
            self._raw_bytes.release(reserved)

    async def _encoded(
        self, source: str | bytes, max_bytes: int, timeout_s: float, *, reserve: bool = True
    ) -> Lease[_Encoded]:
        if isinstance(source, str) and source[:5].lower() != "data:" and source[:7].lower() != "file://":
            make = partial(self._fetch, source, max_bytes, timeout_s, reserve)
            return await self._fetched.lease((source, max_bytes, reserve), make)
        reserved = min(_size_hint(source, max_bytes), max_bytes) if reserve else 0
        await self._reserve(reserved)
        try:
            data = await self._local_bytes(source, max_bytes)
            encoded = _Encoded(data, await _digest(data), reserved)
        except BaseException:
            self._raw_bytes.release(reserved)
            raise
        return Lease(encoded, partial(self._dispose_encoded, encoded))

    async def _local_bytes(self, source: str | bytes, max_bytes: int) -> bytes:
        if isinstance(source, bytes):
            return check_size(source, max_bytes, "the item")
        if source[:5].lower() == "data:":
            if len(source) < _LARGE_BYTES:
                return decode_data_url(source, max_bytes)
            return await asyncio.to_thread(decode_data_url, source, max_bytes)
        return await asyncio.to_thread(lambda: read_file(self._policy.local_path(source), max_bytes))

    async def _fetch(self, url: str, max_bytes: int, timeout_s: float, reserve: bool) -> _Encoded:
        self._fetches += 1
        reserved = 0

        async def make_room(num_bytes: int) -> None:
            nonlocal reserved
            await self._reserve(num_bytes)
            reserved = num_bytes

        try:
            data = await self._fetcher.fetch(
                url, max_bytes=max_bytes, timeout_s=timeout_s, reserve=make_room if reserve else None
            )
            self._fetched_bytes += len(data)
            return _Encoded(data, await _digest(data), reserved)
        except BaseException:
            self._raw_bytes.release(reserved)
            raise

    async def _reserve(self, num_bytes: int) -> None:
        try:
            with anyio.fail_after(self._limits.raw_bytes_timeout_s):
                await self._raw_bytes.acquire(num_bytes)
        except TimeoutError as error:
            raise OverloadedError("the server is busy with other media; try again later") from error

    def _dispose_encoded(self, encoded: _Encoded) -> None:
        self._raw_bytes.release(encoded.reserved)

    async def _decoded(
        self, medium: Medium, sources: tuple[_Encoded, ...], terms: Terms, *, in_parts: bool
    ) -> Lease[_Features]:
        key: Hashable = (medium.kind, in_parts, tuple(source.digest for source in sources), terms)
        job = DecodeJob(
            kind=medium.kind,
            sources=tuple(source.data for source in sources),
            in_parts=in_parts,
            terms=terms,
            folder="",
            name="",
        )
        timeout_s = medium.limits(self._config, self._limits).decode_timeout_s
        return await self._features.lease(key, partial(self._decode, job, timeout_s))

    async def _decode(self, job: DecodeJob, timeout_s: float) -> _Features:
        self._decodes += 1
        decoded, array = await self._workers.run(job, timeout_s)
        return _Features(decoded.grid, decoded.content_hash, decoded.seconds_per_grid, decoded.timestamps, array)

    async def _load_array(self, medium: Medium, array: np.ndarray, terms: Terms) -> Lease[_Features]:
        """Decoded items come from this process's own caller: they are processed here, in a thread."""
        medium.check_array(array, terms)
        array = np.ascontiguousarray(array)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(array.data).digest())
        key = ("array", medium.kind, array.shape, digest, terms)
        return await self._features.lease(key, partial(self._process, medium, array, terms))

    async def _process(self, medium: Medium, array: np.ndarray, terms: Terms) -> _Features:
        self._decodes += 1

        def work() -> _Features:
            processed = medium.process_array(array, terms)
            return _Features(
                processed.grid,
                content_hash(processed, terms.config),
                processed.seconds_per_grid,
                processed.timestamps,
                self._folder.put(processed.features),
            )

        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OverloadedError("no room in shared memory for the item; try again later") from error


def _resized(ref: MediaRef) -> tuple[int, int] | None:
    if ref.resized_width is None and ref.resized_height is None:
        return None
    if ref.resized_width is None or ref.resized_height is None:
        raise MediaError("resized_height and resized_width go together; send both or neither")
    return ref.resized_width, ref.resized_height


def _size_hint(source: str | bytes, unknown: int) -> int:
    """Bytes that a source turns into, as far as it can be told before it is read."""
    if isinstance(source, bytes):
        return len(source)
    return len(source) * 3 // 4 if source[:5].lower() == "data:" else unknown


async def _digest(data: bytes) -> bytes:
    if len(data) < _LARGE_BYTES:
        return hashlib.sha256(data).digest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).digest())


async def _release_all(tasks: list[asyncio.Task[Lease[_Encoded]]]) -> None:
    """Give back every lease that was got, also when another task failed or all were cancelled."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Lease):
            result.release()
