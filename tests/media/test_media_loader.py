"""From a reference to patches: what is fetched, decoded and kept, and what is done only once."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.media.site import LoaderMaker, PictureMaker, Route, Site, until

from dashinfer_vlm.errors import (
    MediaError,
    MediaFetchError,
    MediaRefusedError,
    MediaTimeoutError,
    MediaTooLargeError,
    OverloadedError,
)
from dashinfer_vlm.media.features import decode_spans
from dashinfer_vlm.media.loader import MediaLoader
from dashinfer_vlm.media.medium import MediaLimits
from dashinfer_vlm.media.turns import Party
from dashinfer_vlm.media.types import LoadedMedia, MediaRef
from dashinfer_vlm.media.wire import Decoded
from dashinfer_vlm.processors.qwen import ProcessorConfig, process_image


def ref(source: str | bytes, **fields: object) -> MediaRef:
    return MediaRef(kind="image", source=source, **fields)  # type: ignore[arg-type]


def data_url(data: bytes, type: str = "image/png") -> str:
    return f"data:{type};base64,{base64.b64encode(data).decode()}"


async def test_every_kind_of_source_gives_the_same_patches(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker, tmp_path: Path
) -> None:
    data = picture(130, 75)
    (tmp_path / "a picture.png").write_bytes(data)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    expected = process_image(pixels, ProcessorConfig())
    loader = make_loader(allowed_local_media_path=str(tmp_path))
    sources = (site.serve("/a.png", data), data_url(data), data, f"file://{tmp_path}/a%20picture.png", pixels[None])
    hashes = set()
    for source in sources:
        media = await loader.load(MediaRef(kind="image", source=source))
        assert np.array_equal(media.features.open(), expected.features)
        assert media.grid == expected.grid
        assert media.num_tokens == math.prod(expected.grid) // 4
        hashes.add(media.content_hash)
        media.release()
    assert len(hashes) == 1
    assert len(hashes.pop()) == 32


async def test_identity_is_what_is_seen_not_how_it_was_encoded(make_loader: LoaderMaker) -> None:
    pixels = np.zeros((56, 112, 3), np.uint8)
    hashes = {}
    for name, array in (("wide", pixels), ("tall", pixels.reshape(112, 56, 3)), ("white", pixels + 255)):
        for format in ("PNG", "BMP"):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format)
            media = await make_loader().load(ref(buffer.getvalue()))
            hashes[name, format] = media.content_hash
            media.release()
    assert hashes["wide", "PNG"] == hashes["wide", "BMP"]
    assert len(set(hashes.values())) == 3


async def test_sixteen_loads_of_one_url_cause_one_fetch_and_one_decode(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader()
    url = site.serve("/a.png", picture())
    media = await asyncio.gather(*(loader.load(ref(url)) for _ in range(16)))
    assert site.paths() == ["/a.png"]
    counters = loader.counters
    assert (counters.fetches, counters.decodes) == (1, 1)
    assert (counters.cache_hits, counters.cache_misses) == (15, 1)
    assert len({m.features.path for m in media}) == 1


async def test_equal_bytes_behind_many_names_are_decoded_once(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader()
    data = picture()
    sources: list[str | bytes] = [*(site.serve(f"/{n}.png", data) for n in range(4)), data, data_url(data)]
    await asyncio.gather(*(loader.load(ref(source)) for source in sources))
    assert (loader.counters.fetches, loader.counters.decodes) == (4, 1)


async def test_equal_items_under_another_salt_share_nothing(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    loader, data = make_loader(), picture()
    loaded = [await loader.load(ref(data), salt=salt) for salt in ("", "a", "b", "a")]
    assert loader.counters.decodes == 3
    assert loaded[1].content_hash == loaded[3].content_hash
    assert [len(media.content_hash) for media in loaded] == [32] * 4
    assert len({media.content_hash for media in loaded}) == 3
    for media in loaded:
        media.release()


async def test_a_later_load_of_a_url_fetches_again_and_sees_the_new_picture(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader()
    url = site.serve("/a.png", picture(seed=1))
    first = await loader.load(ref(url))
    again = await loader.load(ref(url))
    assert (loader.counters.fetches, loader.counters.decodes) == (2, 1)
    site.serve("/a.png", picture(seed=2))
    other = await loader.load(ref(url))
    assert first.content_hash == again.content_hash != other.content_hash


async def test_other_pixel_bounds_are_another_medium(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    loader = make_loader()
    data = picture(400, 400)
    large = await loader.load(ref(data))
    small = await loader.load(ref(data, max_pixels=28 * 28 * 16))
    assert large.num_tokens > small.num_tokens <= 16
    assert large.content_hash != small.content_hash
    assert loader.counters.decodes == 2


async def test_a_cancelled_load_does_not_disturb_the_others(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    asked, go = asyncio.Event(), asyncio.Event()
    url = site.serve("/a.png", picture())
    answer = site.routes["/a.png"]

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await go.wait()
        await answer(reader, writer)

    site.routes["/a.png"] = wait
    loader = make_loader()
    first, second = (asyncio.create_task(loader.load(ref(url))) for _ in range(2))
    await asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go.set()
    assert (await second).grid == (1, 4, 4)
    assert loader.counters.fetches == 1


async def test_when_every_client_left_the_fetch_is_dropped(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
        await writer.drain()
        await reader.read()  # ends when the client hangs up
        left.set()

    site.routes["/slow.png"] = wait
    loader = make_loader()
    tasks = [asyncio.create_task(loader.load(ref(site.url("/slow.png")))) for _ in range(3)]
    await asked.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(left.wait(), 20)
    url = site.serve("/a.png", picture())
    assert (await loader.load(ref(url))).grid == (1, 4, 4)


async def test_patches_in_use_outlive_the_cache_and_are_removed_after(
    make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader(media_cache_mib=0)
    first, second = [await loader.load(ref(picture(seed=seed))) for seed in (1, 2)]
    assert first.features.open().shape == second.features.open().shape
    first.release()
    first.release()
    with pytest.raises(FileNotFoundError):
        first.features.open()
    assert second.features.open().size
    assert loader.counters.cache_bytes == second.features.nbytes
    second.release()
    assert loader.counters.cache_bytes == 0


async def test_the_least_recently_used_patches_make_room(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    config = ProcessorConfig(min_pixels=28 * 28 * 256, max_pixels=28 * 28 * 300)  # about 1.2 MB of patches each
    loader = make_loader(config, media_cache_mib=3)
    pictures = [picture(seed=seed) for seed in range(3)]
    for data in (pictures[0], pictures[1], pictures[0], pictures[2], pictures[0], pictures[1]):
        (await loader.load(ref(data))).release()
    assert loader.counters.cache_bytes <= 3 << 20
    assert loader.counters.decodes == 4, "the first stays, the second was the one to go"


async def test_errors_name_the_place_in_the_request_and_are_counted(make_loader: LoaderMaker) -> None:
    loader = make_loader()
    with pytest.raises(MediaError, match="not an image") as caught:
        await loader.load(ref(b"no picture", param="messages[0].content[1]"))
    assert caught.value.param == "messages[0].content[1]"
    with pytest.raises(MediaRefusedError) as refused:
        await loader.load(ref("http://10.0.0.1/a.png", param="x"))
    assert refused.value.param == "x"
    assert (loader.counters.failures, loader.counters.refusals) == (2, 1)


async def test_a_failed_load_is_tried_again_by_the_next(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader()
    url = site.serve("/a.png", b"", status=503)
    with pytest.raises(MediaFetchError, match="status 503"):
        await loader.load(ref(url))
    site.serve("/a.png", picture())
    assert (await loader.load(ref(url))).num_tokens == 4


def dripping(first: bytes, arrived: asyncio.Semaphore, go: asyncio.Event, rest: bytes = b"", size: int = 0) -> Route:
    """Announces `size` bytes, sends the first ones, and the rest when told to."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {size or len(first + rest)}\r\n\r\n".encode() + first)
        await writer.drain()
        arrived.release()
        await go.wait()
        writer.write(rest)

    return answer


async def test_raw_bytes_in_flight_are_bounded(site: Site, make_loader: LoaderMaker, picture: PictureMaker) -> None:
    limits = MediaLimits(max_video_bytes=1 << 20, max_raw_bytes=1 << 20)
    loader = make_loader(limits=limits, max_image_mib=1)
    arrived, go = asyncio.Semaphore(0), asyncio.Event()
    data = picture(300, 300)
    assert (1 << 20) / 5 < len(data) < (1 << 20) / 3
    for n in range(5):
        site.routes[f"/{n}"] = dripping(data[:-1], arrived, go, data[-1:])
    loads = [asyncio.create_task(loader.load(ref(site.url(f"/{n}")))) for n in range(5)]
    for _ in loads:
        await arrived.acquire()
    await until(lambda: loader.raw_bytes_free < len(data))
    assert loader.raw_bytes_free >= 0
    go.set()
    results = await asyncio.gather(*loads, return_exceptions=True)
    for media in results:
        assert isinstance(media, LoadedMedia | OverloadedError), media
    assert sum(isinstance(media, LoadedMedia) for media in results) >= 3
    assert loader.raw_bytes_free == 1 << 20


async def test_videos_that_announce_much_and_drip_hold_only_what_has_arrived(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader()
    whole = loader.raw_bytes_free
    arrived, go = asyncio.Semaphore(0), asyncio.Event()
    for n in range(4):
        site.routes[f"/{n}"] = dripping(b"x" * 100, arrived, go, size=256 << 20)
    drips = [asyncio.create_task(loader.load(MediaRef(kind="video", source=site.url(f"/{n}")))) for n in range(4)]
    for _ in drips:
        await arrived.acquire()
    await until(lambda: loader.raw_bytes_free == whole - 400)
    (await loader.load(ref(picture()))).release()
    (await loader.load(ref(site.serve("/a.png", picture(seed=1))))).release()
    go.set()
    for error in await asyncio.gather(*drips, return_exceptions=True):
        assert isinstance(error, MediaFetchError)
    assert loader.raw_bytes_free == whole


async def test_no_room_for_raw_bytes_is_an_overload_not_a_wait_for_ever(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    limits = MediaLimits(max_video_bytes=1 << 20, max_raw_bytes=1 << 20, wait_timeout_s=0.05)
    loader = make_loader(limits=limits, max_image_mib=1)
    arrived, go = asyncio.Semaphore(0), asyncio.Event()
    data = picture().ljust((1 << 20) - 1, b"\0")
    site.routes["/slow"] = dripping(data[:-1], arrived, go, data[-1:])
    slow = asyncio.create_task(loader.load(ref(site.url("/slow"))))
    await until(lambda: loader.raw_bytes_free < 100)
    with pytest.raises(OverloadedError, match="busy with other media"):
        await loader.load(ref(picture(seed=9)))
    go.set()
    (await slow).release()


async def test_one_host_that_is_silent_leaves_the_places_of_others_free(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    limits = MediaLimits(max_fetches=6, max_fetches_per_host=4)
    resolver = ("127.0.0.1",)

    async def resolve(host: str, port: int) -> list[str]:
        return list(resolver)

    hosts = (f"silent.test:{site.port}", f"other.test:{site.port}")
    loader = make_loader(limits=limits, resolve=resolve, allowed_media_domains=hosts)
    arrived, go = asyncio.Semaphore(0), asyncio.Event()
    site.routes["/silent"] = dripping(b"", arrived, go, size=100)
    for n in range(20):
        site.routes[f"/{n}"] = site.routes["/silent"]
    silent = [
        asyncio.create_task(loader.load(ref(site.url(f"/{n}", "silent.test")), Party(None, n))) for n in range(20)
    ]
    for _ in range(4):
        await arrived.acquire()
    site.serve("/a.png", picture())
    (await loader.load(ref(site.url("/a.png", "other.test")))).release()
    assert len(site.requests) == 5
    for task in silent:
        task.cancel()
    go.set()
    await asyncio.gather(*silent, return_exceptions=True)


@pytest.mark.timeout(60)
async def test_one_request_of_many_silent_urls_leaves_places_for_others(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    limits = MediaLimits(max_fetches=6, max_fetches_per_host=6, max_fetches_per_request=4)
    loader = make_loader(limits=limits, image_fetch_timeout_s=3600.0)  # no silent one ends by itself
    arrived, go = asyncio.Semaphore(0), asyncio.Event()
    for n in range(20):
        site.routes[f"/{n}"] = dripping(b"", arrived, go, size=100)
    silent = [asyncio.create_task(loader.load(ref(site.url(f"/{n}")), Party(None, "greedy"))) for n in range(20)]
    for _ in range(4):
        await arrived.acquire()
    (await loader.load(ref(site.serve("/a.png", picture())), Party(None, "modest"))).release()
    for task in silent:
        task.cancel()
    go.set()
    await asyncio.gather(*silent, return_exceptions=True)


async def test_fetches_at_once_are_bounded_for_a_request_and_in_all(
    site: Site, make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader(limits=MediaLimits(max_fetches=5, max_fetches_per_request=3))
    at_once: Counter[str] = Counter()
    most: Counter[str] = Counter()
    data, full = picture(), asyncio.Event()

    async def answer(party: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at_once.update([party, "all"])
        for name in (party, "all"):
            most[name] = max(most[name], at_once[name])
        if at_once["all"] == 5:
            full.set()
        await full.wait()
        await asyncio.sleep(0)
        at_once.subtract([party, "all"])
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    asked = []
    for party in "abc":
        for n in range(20):
            site.routes[f"/{party}{n}"] = partial(answer, party)
            asked.append(loader.load(ref(site.url(f"/{party}{n}")), Party(None, party)))
    for medium in await asyncio.gather(*asked):
        medium.release()
    assert most["all"] == 5
    assert max(most[party] for party in "abc") <= 3
    assert len(site.requests) == 60


async def test_when_no_place_comes_free_in_time_the_server_says_that_it_is_busy(
    site: Site, make_loader: LoaderMaker
) -> None:
    loader = make_loader(limits=MediaLimits(max_fetches=1, wait_timeout_s=0.05))
    arrived, go = asyncio.Semaphore(0), asyncio.Event()
    site.routes["/silent"] = dripping(b"", arrived, go, size=100)
    silent = asyncio.create_task(loader.load(ref(site.url("/silent"))))
    await arrived.acquire()
    with pytest.raises(OverloadedError, match="busy with other media; try again later"):
        await loader.load(ref(site.serve("/a.png", b"x")))
    silent.cancel()
    go.set()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), "2 frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "0 frames"),
        (np.zeros((1, 0, 8, 3), np.uint8), "at least 1"),
        (np.zeros((1, 1, 201, 3), np.uint8), "200 times"),
    ],
)
async def test_an_array_that_is_no_picture_is_refused(
    make_loader: LoaderMaker, array: np.ndarray, message: str
) -> None:
    with pytest.raises(MediaError, match=message):
        await make_loader().load(MediaRef(kind="image", source=array))


async def test_a_strided_array_is_read_by_value(make_loader: LoaderMaker) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (1, 112, 168, 3), dtype=np.uint8)
    loader = make_loader()
    strided = await loader.load(MediaRef(kind="image", source=array[:, ::2, ::-3]))
    packed = await loader.load(MediaRef(kind="image", source=np.ascontiguousarray(array[:, ::2, ::-3])))
    assert strided.content_hash == packed.content_hash
    assert loader.counters.decodes == 1


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
async def test_a_frame_rate_that_is_none_is_refused(make_loader: LoaderMaker, fps: float) -> None:
    with pytest.raises(MediaError, match="fps is"):
        await make_loader().load(MediaRef(kind="video", source=b"x", fps=fps))


async def test_bounds_outside_the_servers_are_refused(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    with pytest.raises(MediaError, match="max_pixels is 99999999; this server takes"):
        await make_loader().load(ref(picture(), max_pixels=99_999_999))


async def test_close_leaves_no_files_and_no_processes(make_loader: LoaderMaker, picture: PictureMaker) -> None:
    loader = make_loader()
    media = await loader.load(ref(picture()))
    folder = Path(media.features.path).parent
    assert folder.is_dir()
    await loader.close()
    assert not folder.exists()
    media.release()


async def test_a_load_of_many_pictures_at_once_gives_each_its_own(
    make_loader: LoaderMaker, picture: PictureMaker
) -> None:
    loader = make_loader(media_workers=2)
    pictures = [picture(56, 56, seed=seed) for seed in range(12)]
    media = await asyncio.gather(*(loader.load(ref(data)) for data in pictures))
    for data, loaded in zip(pictures, media, strict=True):
        expected = process_image(np.asarray(Image.open(io.BytesIO(data))), ProcessorConfig())
        assert np.array_equal(loaded.features.open(), expected.features)


async def test_time_out_size_and_broken_hosts_have_their_own_errors(site: Site, make_loader: LoaderMaker) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    site.routes["/never"] = never
    loader = make_loader(image_fetch_timeout_s=0.2, max_image_mib=1)
    with pytest.raises(MediaTimeoutError, match=r"127\.0\.0\.1 did not deliver in time"):
        await loader.load(ref(site.url("/never")))
    with pytest.raises(MediaTooLargeError, match="announces 1048577 bytes"):
        await loader.load(ref(site.serve("/large", b"x" * ((1 << 20) + 1))))


def test_opening_a_loader_needs_no_event_loop(make_loader: LoaderMaker) -> None:
    assert isinstance(make_loader(), MediaLoader)


async def test_a_load_says_where_its_time_went(site: Site, make_loader: LoaderMaker, picture: PictureMaker) -> None:
    loader = make_loader()
    url = site.serve("/a.png", picture(130, 75))
    start_s = time.perf_counter()
    first = await loader.load(ref(url))
    spans = {span.stage: span for span in first.spans}
    assert list(spans) == ["fetch", "decode_wait", "decode", "preprocess"]
    assert start_s <= spans["fetch"].start_s
    assert spans["decode_wait"].end_s == spans["decode"].start_s
    assert spans["decode"].end_s == spans["preprocess"].start_s
    assert spans["preprocess"].end_s <= time.perf_counter()
    assert all(span.seconds > 0 for span in first.spans)
    again = await loader.load(ref(url))
    assert [span.stage for span in again.spans] == ["fetch"], "it was decoded before this load began"
    first.release()
    again.release()


@pytest.mark.parametrize("said", [float("nan"), -1.0, 1e9])
def test_a_decoding_process_cannot_make_times_up(said: float) -> None:
    decoded = Decoded(
        grid=(1, 2, 2), content_hash=b"", seconds_per_grid=1.0, timestamps=(), decode_s=said, preprocess_s=said
    )
    spans = decode_spans(decoded, 10.0, 12.0)
    assert [span.start_s for span in spans] == sorted(span.start_s for span in spans)
    assert sum(span.seconds for span in spans) == 2.0


@pytest.mark.parametrize("number", [0, 2**64, 10**400])
@pytest.mark.parametrize("names", [("resized_width", "resized_height"), ("total_pixels",)])
async def test_numbers_of_pixels_that_nothing_has_are_refused(
    make_loader: LoaderMaker, picture: PictureMaker, names: tuple[str, ...], number: int
) -> None:
    loader = make_loader()
    with pytest.raises(MediaError, match=f"{names[0]} is"):
        await loader.load(ref(picture(), **dict.fromkeys(names, number)))
