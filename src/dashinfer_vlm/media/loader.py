"""The media room's door: a reference as a client gave it becomes features in shared memory, with nothing done twice.

    URL ──fetch──► encoded bytes ──hash──► decoded? ──no──► decoding process ──► features (leased, cached)

Identity is content: features are found again by the hash of the encoded bytes and the settings, never by a URL.
Concurrent loads of one URL share one fetch, concurrent loads of equal bytes share one decode; a later load of the URL
fetches it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from functools import partial

import numpy as np

from dashinfer_vlm.config import MediaConfig
from dashinfer_vlm.errors import MediaError, MediaRefusedError, MediaTooLargeError, UnsupportedError
from dashinfer_vlm.media.cache import Lease, LeasedCache
from dashinfer_vlm.media.decode import content_hash
from dashinfer_vlm.media.embeddings import embedding_hash, read_embedding
from dashinfer_vlm.media.features import Features, cache_bytes, decode_spans, put_features, salted
from dashinfer_vlm.media.fetch import Resolver
from dashinfer_vlm.media.medium import DEFAULT_LIMITS, MediaLimits, Medium
from dashinfer_vlm.media.policy import MediaPolicy
from dashinfer_vlm.media.registry import MEDIA
from dashinfer_vlm.media.sources import Encoded, Sources
from dashinfer_vlm.media.turns import ANYBODY, Party
from dashinfer_vlm.media.types import GivenEmbedding, LoadedMedia, MediaCounters, MediaRef, Source
from dashinfer_vlm.media.wire import DecodeJob, Terms
from dashinfer_vlm.media.workers import SharedMemoryFullError, WorkerPool
from dashinfer_vlm.processors.qwen import ProcessorConfig
from dashinfer_vlm.processors.videos import Sampling
from dashinfer_vlm.shared_array import SharedFolder
from dashinfer_vlm.stages import Span, since, timed


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
        policy = MediaPolicy(config.allowed_media_domains, config.allowed_local_media_path)
        largest = max(medium.limits(config, limits).max_bytes for medium in MEDIA.values())
        self._sources = Sources(policy, limits, largest, resolve=resolve)
        self._folder = SharedFolder()
        # Up to four copies of four bytes per pixel exist while transparency is composited; the rest is the program and
        # the frames of a video, which exist three times while they are cut.
        memory_mib = 3072 + config.max_image_mpx * 16
        self._workers = WorkerPool(
            config.media_workers or 1,
            memory_mib=memory_mib,
            folder=self._folder.path,
            wait_timeout_s=limits.wait_timeout_s,
        )
        self._features = LeasedCache[Features](
            cache_bytes(config.media_cache_mib << 20, self._folder),
            size_of=lambda p: p.array.nbytes,
            dispose=lambda p: p.array.remove(),
        )
        self._decodes = self._refusals = self._failures = 0

    @property
    def raw_bytes_free(self) -> int:
        """Room that is left for encoded bytes; the whole budget when nothing is being loaded."""
        return self._sources.free_bytes

    @property
    def pixel_bounds(self) -> tuple[int, int]:
        """The bounds that a reference's own must lie within."""
        return self._processor.min_pixels, self._processor.max_pixels

    @property
    def side_step(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        return self._processor.factor

    @property
    def counters(self) -> MediaCounters:
        return MediaCounters(
            fetches=self._sources.num_fetches,
            fetched_bytes=self._sources.num_fetched_bytes,
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
        await self._sources.close()
        await self._features.close()
        await self._workers.close()
        self._folder.close()

    async def load(self, ref: MediaRef, party: Party = ANYBODY, *, salt: str = "") -> LoadedMedia:
        """Fetch, decode and process; the caller must call `release` of the result once.

        `party` is whom the item is for: owners take turns, and their requests, however many items each has. Equal items
        share what was decoded, and their `content_hash`, only under the same `salt`. Raises MediaError and its kinds,
        with `param` from the reference, UnsupportedError for an embedding where none are taken, and OverloadedError.
        """
        medium = MEDIA[ref.kind]
        if isinstance(ref.source, GivenEmbedding) and not self._config.enable_mm_embeds:
            raise UnsupportedError("image_embeds are not taken here; start with --enable-mm-embeds", param=ref.param)
        start_s, fetches = time.perf_counter(), list[Span]()
        try:
            terms = self._terms(ref, salt)
            lease = await self._load(medium, ref.source, terms, party, fetches)
        except MediaError as error:
            self._failures += 1
            self._refusals += isinstance(error, MediaRefusedError)
            raise type(error)(str(error), param=ref.param) from error
        made = lease.value
        return LoadedMedia(
            kind=ref.kind,
            grid=made.grid,
            num_tokens=medium.num_tokens(made.grid, terms.config),
            content_hash=salted(made.content_hash, salt),
            features=made.array,
            release=lease.release,
            seconds_per_grid=made.seconds_per_grid,
            timestamps=made.timestamps,
            is_embedding=isinstance(ref.source, GivenEmbedding),
            spans=(*fetches, *since(made.spans, start_s)),
        )

    def _terms(self, ref: MediaRef, salt: str) -> Terms:
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
            salt=salt,
        )

    async def _load(
        self, medium: Medium, source: Source, terms: Terms, party: Party, fetches: list[Span]
    ) -> Lease[Features]:
        if isinstance(source, np.ndarray):
            return await self._load_array(medium, source, terms)
        if isinstance(source, tuple):
            return await self._load_parts(medium, source, terms, party, fetches)
        if isinstance(source, GivenEmbedding):
            return await self._load_embedding(medium, source, terms, party)
        with timed("fetch", fetches):
            encoded = await self._sources.encoded(source, medium.limits(self._config, self._limits), party)
        try:
            return await self._decoded(medium, (encoded.value,), terms, party, in_parts=False)
        finally:
            encoded.release()

    async def _load_parts(
        self, medium: Medium, sources: tuple[str | bytes, ...], terms: Terms, party: Party, fetches: list[Span]
    ) -> Lease[Features]:
        medium.check_parts(len(sources), terms.config)
        most = medium.limits(self._config, self._limits).max_bytes
        limits = medium.part_limits(self._config, self._limits)
        left = most

        async def fetch(source: str | bytes) -> Lease[Encoded]:
            nonlocal left
            part = await self._sources.encoded(source, limits, party)
            left -= len(part.value.data)
            if left < 0:
                part.release()
                raise MediaTooLargeError(f"the frames are together larger than the limit of {most} bytes")
            return part

        tasks = [asyncio.create_task(fetch(source)) for source in sources]
        try:
            with timed("fetch", fetches):
                parts = tuple(lease.value for lease in await asyncio.gather(*tasks))
            return await self._decoded(medium, parts, terms, party, in_parts=True)
        finally:
            await _release_all(tasks)

    async def _decoded(
        self, medium: Medium, sources: tuple[Encoded, ...], terms: Terms, party: Party, *, in_parts: bool
    ) -> Lease[Features]:
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
        return await self._features.lease(key, partial(self._decode, job, timeout_s, party))

    async def _decode(self, job: DecodeJob, timeout_s: float, party: Party) -> Features:
        self._decodes += 1
        start_s = time.perf_counter()
        try:
            decoded, array = await self._workers.run(job, timeout_s, party)
        except SharedMemoryFullError:
            self._features.drop_unused()
            decoded, array = await self._workers.run(job, timeout_s, party)
        return Features(
            decoded.grid,
            decoded.content_hash,
            decoded.seconds_per_grid,
            decoded.timestamps,
            array,
            decode_spans(decoded, start_s, time.perf_counter()),
        )

    async def _load_array(self, medium: Medium, array: np.ndarray, terms: Terms) -> Lease[Features]:
        """Decoded items come from this process's own caller: they are processed here, in a thread."""
        medium.check_array(array, terms)
        array = np.ascontiguousarray(array)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(array.data).digest())
        key = ("array", medium.kind, array.shape, digest, terms)
        return await self._features.lease(key, partial(self._process, medium, array, terms))

    async def _load_embedding(
        self, medium: Medium, source: GivenEmbedding, terms: Terms, party: Party
    ) -> Lease[Features]:
        limits = medium.limits(self._config, self._limits)
        with ExitStack() as stack:
            files: list[Encoded] = []
            for text in (source.image_embeds, source.image_grid_thw):
                lease = await self._sources.encoded(f"data:;base64,{text}", limits, party)
                stack.callback(lease.release)
                files.append(lease.value)

            def work() -> Features:
                rows, grid = read_embedding(files[0].data, files[1].data, merge_size=terms.config.merge_size)
                return Features(grid, embedding_hash(rows), 1.0, (), put_features(self._folder, rows))

            key = ("embedding", terms.salt, *(file.digest for file in files))
            return await self._features.lease(key, partial(self._in_thread, work))

    async def _process(self, medium: Medium, array: np.ndarray, terms: Terms) -> Features:
        self._decodes += 1

        def work() -> Features:
            spans: list[Span] = []
            with timed("preprocess", spans):
                processed = medium.process_array(array, terms)
            return Features(
                processed.grid,
                content_hash(processed, terms.config),
                processed.seconds_per_grid,
                processed.timestamps,
                put_features(self._folder, processed.features),
                tuple(spans),
            )

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], Features]) -> Features:
        try:
            return await asyncio.to_thread(work)
        except SharedMemoryFullError:
            self._features.drop_unused()
            return await asyncio.to_thread(work)


def _resized(ref: MediaRef) -> tuple[int, int] | None:
    if ref.resized_width is None and ref.resized_height is None:
        return None
    if ref.resized_width is None or ref.resized_height is None:
        raise MediaError("resized_height and resized_width go together; send both or neither")
    return ref.resized_width, ref.resized_height


async def _release_all(tasks: list[asyncio.Task[Lease[Encoded]]]) -> None:
    """Give back every lease that was got, also when another task failed or all were cancelled."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Lease):
            result.release()
