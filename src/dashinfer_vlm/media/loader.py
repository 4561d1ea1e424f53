"""The media room's door: a reference as a client gave it becomes patches in shared memory, with nothing done twice.

    URL ──fetch──► encoded bytes ──hash──► decoded? ──no──► decoding process ──► patches (leased, cached)

Identity is content: encoded patches are found again by the hash of the encoded bytes and the settings, never by a URL.
Concurrent loads of one URL share one fetch, concurrent loads of equal bytes share one decode; a later load of the URL
fetches it again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

import anyio
import numpy as np

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.errors import MediaError, MediaRefusedError, MediaTooLargeError, OverloadedError
from dashinfer_vlm.media.cache import ByteBudget, Lease, LeasedCache
from dashinfer_vlm.media.decode import content_hash, frame_list_step
from dashinfer_vlm.media.fetch import Fetcher, Resolver, check_size, decode_data_url, read_file
from dashinfer_vlm.media.policy import MediaPolicy
from dashinfer_vlm.media.types import LoadedMedia, MediaRef
from dashinfer_vlm.media.wire import DecodeJob, JobKind
from dashinfer_vlm.media.workers import WorkerPool
from dashinfer_vlm.processors.qwen import (
    Pixels,
    Processed,
    ProcessorConfig,
    check_num_patches,
    image_grid,
    process_frames,
    process_image,
    video_grid,
)
from dashinfer_vlm.processors.qwen import num_tokens as count_tokens
from dashinfer_vlm.processors.videos import Sampling
from dashinfer_vlm.request import Grid, ItemKind
from dashinfer_vlm.shared_array import SharedArray, SharedFolder

_LARGE_BYTES = 1 << 20
"""What takes longer than a millisecond or so to hash is hashed in a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Limits that have no flag of their own."""

    max_video_bytes: int = 256 << 20
    """Also of all frames of a list together."""
    max_video_s: float = 3600.0
    video_fetch_timeout_s: float = 30.0
    image_decode_timeout_s: float = 30.0
    video_decode_timeout_s: float = 120.0
    max_raw_bytes: int = 512 << 20
    """Encoded bytes held at once by all loads together."""
    raw_bytes_timeout_s: float = 30.0
    """Waiting for room among them."""
    num_frame_fetches: int = 8
    """Frames of one list that are fetched at once."""


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
class _Patches:
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
        limits: MediaLimits = MediaLimits(),
        resolve: Resolver | None = None,
    ) -> None:
        """Raises ConfigError for a host or folder of `config` that cannot be used. Starts nothing yet."""
        self._processor = processor
        self._limits = limits
        self._max_image_bytes = config.max_image_mib << 20
        self._max_pixels = config.max_image_mpx * 1_000_000
        self._image_fetch_timeout_s = config.image_fetch_timeout_s
        self.max_patches: int | None = None
        """Patches of one medium that the engine's encoder has memory for; known once the engine is, None until then."""
        self._policy = MediaPolicy(config.allowed_media_domains, config.allowed_local_media_path)
        self._fetcher = Fetcher(self._policy, resolve=resolve)
        self._folder = SharedFolder()
        # Up to four copies of four bytes per pixel exist while transparency is composited; the rest is the program.
        memory_mib = 1024 + config.max_image_mpx * 16
        self._workers = WorkerPool(config.media_workers, memory_mib=memory_mib, folder=self._folder.path)
        largest = max(self._max_image_bytes, limits.max_video_bytes)
        self._raw_bytes = ByteBudget(max(limits.max_raw_bytes, largest))
        self._fetched = LeasedCache[_Encoded](0, size_of=lambda e: len(e.data), dispose=self._dispose_encoded)
        self._patches = LeasedCache[_Patches](
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
    def counters(self) -> MediaCounters:
        return MediaCounters(
            fetches=self._fetches,
            fetched_bytes=self._fetched_bytes,
            decodes=self._decodes,
            cache_hits=self._patches.num_hits,
            cache_misses=self._patches.num_misses,
            cache_bytes=self._patches.num_bytes,
            refusals=self._refusals,
            failures=self._failures,
            worker_restarts=self._workers.num_restarts,
        )

    async def start(self) -> None:
        """Start the decoding processes ahead of the first load, which otherwise waits for one."""
        await self._workers.start()

    async def close(self) -> None:
        """End processes and connections, remove all patches; loads that still run are cancelled."""
        await self._fetched.close()
        await self._patches.close()
        await self._workers.close()
        await self._fetcher.close()
        self._folder.close()

    async def load(self, ref: MediaRef) -> LoadedMedia:
        """Fetch, decode, resize and cut; the caller must call `release` of the result once.

        Raises MediaError and its kinds, with `param` from the reference, and OverloadedError.
        """
        try:
            config = self._config(ref)
            lease = await self._load(ref, config)
        except MediaError as error:
            self._failures += 1
            self._refusals += isinstance(error, MediaRefusedError)
            raise type(error)(str(error), param=ref.param) from error
        patches = lease.value
        return LoadedMedia(
            kind=ref.kind,
            grid=patches.grid,
            num_tokens=count_tokens(patches.grid, config.merge_size),
            content_hash=patches.content_hash,
            patches=patches.array,
            release=lease.release,
            seconds_per_grid=patches.seconds_per_grid,
            timestamps=patches.timestamps,
        )

    def _config(self, ref: MediaRef) -> ProcessorConfig:
        """The settings under the reference's bounds; raises MediaError for those that cannot be."""
        _sampling(ref).check(self._processor.video.max_frames)
        return self._processor.for_request(
            ref.min_pixels, ref.max_pixels, total_pixels=ref.total_pixels, resized=_resized(ref)
        )

    async def _load(self, ref: MediaRef, config: ProcessorConfig) -> Lease[_Patches]:
        if isinstance(ref.source, np.ndarray):
            return await self._load_array(ref, ref.source, config)
        if isinstance(ref.source, tuple):
            return await self._load_frames(ref, ref.source, config)
        video = ref.kind == "video"
        max_bytes = self._limits.max_video_bytes if video else self._max_image_bytes
        timeout_s = self._limits.video_fetch_timeout_s if video else self._image_fetch_timeout_s
        encoded = await self._encoded(ref.source, max_bytes, timeout_s)
        try:
            return await self._decoded(ref.kind, (encoded.value,), config, _sampling(ref))
        finally:
            encoded.release()

    async def _load_frames(
        self, ref: MediaRef, sources: tuple[str | bytes, ...], config: ProcessorConfig
    ) -> Lease[_Patches]:
        """The images of one video. Room for all of them is taken at once: taken one by one, two loads could each
        hold what the other waits for."""
        if ref.kind != "video" or not 1 <= len(sources) <= config.video.max_frames:
            raise MediaTooLargeError(f"a list of {len(sources)} frames; a video has 1 to {config.video.max_frames}")
        most = self._limits.max_video_bytes
        reserved = min(most, sum(_size_hint(source, self._max_image_bytes) for source in sources))
        await self._reserve(reserved)
        fetches = asyncio.Semaphore(self._limits.num_frame_fetches)

        async def fetch(source: str | bytes) -> Lease[_Encoded]:
            async with fetches:
                return await self._encoded(source, self._max_image_bytes, self._image_fetch_timeout_s, reserve=False)

        tasks = [asyncio.create_task(fetch(source)) for source in sources]
        try:
            frames = [lease.value for lease in await asyncio.gather(*tasks)]
            if sum(len(frame.data) for frame in frames) > most:
                raise MediaTooLargeError(f"the frames are together larger than the limit of {most} bytes")
            return await self._decoded("frames", tuple(frames), config, _sampling(ref))
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
            return check_size(source, max_bytes, "the medium")
        if source[:5].lower() == "data:":
            return decode_data_url(source, max_bytes)
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
        self, kind: JobKind, sources: tuple[_Encoded, ...], config: ProcessorConfig, sampling: Sampling
    ) -> Lease[_Patches]:
        key: Hashable = (kind, tuple(source.digest for source in sources), config, sampling)
        return await self._patches.lease(key, partial(self._decode, kind, sources, config, sampling))

    async def _decode(
        self, kind: JobKind, sources: tuple[_Encoded, ...], config: ProcessorConfig, sampling: Sampling
    ) -> _Patches:
        self._decodes += 1
        job = DecodeJob(
            kind=kind,
            sources=tuple(source.data for source in sources),
            config=config,
            folder="",
            name="",
            max_pixels=self._max_pixels,
            max_video_s=self._limits.max_video_s,
            sampling=sampling,
            max_patches=self.max_patches,
        )
        limits = self._limits
        timeout_s = limits.image_decode_timeout_s if kind == "image" else limits.video_decode_timeout_s
        decoded, array = await self._workers.run(job, timeout_s)
        return _Patches(decoded.grid, decoded.content_hash, decoded.seconds_per_grid, decoded.timestamps, array)

    async def _load_array(self, ref: MediaRef, frames: np.ndarray, config: ProcessorConfig) -> Lease[_Patches]:
        """Decoded frames come from this process's own caller: they are cut here, in a thread."""
        _check_array(ref.kind, frames, self._max_pixels, config)
        _check_grid(ref.kind, frames, config, self.max_patches)
        frames = np.ascontiguousarray(frames)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(frames.data).digest())
        key = ("array", ref.kind, frames.shape, digest, config, ref.fps)
        return await self._patches.lease(key, partial(self._cut, ref.kind, frames, config, ref.fps))

    async def _cut(self, kind: ItemKind, frames: Pixels, config: ProcessorConfig, fps: float | None) -> _Patches:
        self._decodes += 1

        def cut() -> _Patches:
            processed = _process_array(kind, frames, config, fps)
            return _Patches(
                processed.grid,
                content_hash(processed, config),
                processed.seconds_per_grid,
                processed.timestamps,
                self._folder.put(processed.patches),
            )

        try:
            return await asyncio.to_thread(cut)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OverloadedError("no room in shared memory for the medium; try again later") from error


def _process_array(kind: ItemKind, frames: Pixels, config: ProcessorConfig, fps: float | None) -> Processed:
    if kind == "image":
        return process_image(frames[0], config)
    return process_frames(frames, config, num_frames=len(frames), seconds_per_grid=frame_list_step(config, fps))


def _check_array(kind: ItemKind, frames: np.ndarray, max_pixels: int, config: ProcessorConfig) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise MediaError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    most = 1 if kind == "image" else config.video.max_frames
    if not 1 <= len(frames) <= most:
        raise MediaTooLargeError(f"the array has {len(frames)} frames; this {kind} may have 1 to {most}")
    if math.prod(frames.shape[1:3]) > max_pixels:
        sides = f"{frames.shape[2]}x{frames.shape[1]}"
        raise MediaTooLargeError(f"the {kind} has {sides} pixels; the limit is {max_pixels / 1e6:g} million")


def _check_grid(kind: ItemKind, frames: np.ndarray, config: ProcessorConfig, max_patches: int | None) -> None:
    num_frames, height, width, _ = frames.shape
    image = kind == "image"
    grid = image_grid(width, height, config) if image else video_grid(width, height, num_frames, config)
    check_num_patches(grid, max_patches, config, kind)


def _sampling(ref: MediaRef) -> Sampling:
    return Sampling(fps=ref.fps, num_frames=ref.num_frames, min_frames=ref.min_frames, max_frames=ref.max_frames)


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
