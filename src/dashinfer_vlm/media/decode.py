"""The process that decodes untrusted bytes: `python -m dashinfer_vlm.media.decode MEMORY_MIB`, jobs on stdin.

It has a memory limit, none of the server's secrets in its environment, and no torch: it starts in well under half a
second. It may die on any job; `workers.py` then replaces it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media import images
from dashinfer_vlm.media.wire import LENGTH_BYTES, Decoded, DecodeJob, Failed, Ready, Reply
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
from dashinfer_vlm.shared_array import put


def process(job: DecodeJob) -> Processed:
    """Decode, resize and cut. Raises MediaError for what cannot be used."""
    if job.kind == "video":
        from dashinfer_vlm.media.videos import process_video  # PyAV takes as long to import as all the rest

        return process_video(
            job.sources[0],
            job.config,
            sampling=job.sampling,
            max_pixels=job.max_pixels,
            max_video_s=job.max_video_s,
            max_patches=job.max_patches,
        )
    if job.kind == "frames":
        step_s = frame_list_step(job.config, job.sampling.fps)
        return process_frames(_frames(job), job.config, num_frames=len(job.sources), seconds_per_grid=step_s)
    return process_image(_picture(job.sources[0], job), job.config)


def frame_list_step(config: ProcessorConfig, fps: float | None) -> float:
    """Seconds per temporal grid step of a list of frames, which were taken at `fps` (the config's without one)."""
    return config.temporal_patch_size / (fps or config.video.fps)


def content_hash(processed: Processed, config: ProcessorConfig) -> bytes:
    """32 bytes: what the encoder sees, and all that decides what it makes of it.

    Over the patches (pixels after decoding and resizing), so that the same picture in another file is the same
    content, and over the grid and the settings, so that equal bytes in another shape are not.
    """
    shape = (config.patch_size, config.temporal_patch_size, config.merge_size, config.image_mean, config.image_std)
    settings = repr((1, processed.grid, processed.seconds_per_grid, config.rescale_factor, *shape))
    digest = hashlib.sha256(settings.encode())
    digest.update(processed.patches.data)
    return digest.digest()


def _picture(source: bytes, job: DecodeJob) -> Pixels:
    image = images.open_image(source, job.max_pixels)
    _check_size(*images.upright_size(image), job)
    return images.decode(image)


def _check_size(width: int, height: int, job: DecodeJob) -> None:
    """An impossible shape, and what the encoder has no memory for, are refused before they are decoded."""
    if job.kind == "image":
        check_num_patches(image_grid(width, height, job.config), job.max_patches, job.config, "image")
    else:
        grid = video_grid(width, height, len(job.sources), job.config)
        check_num_patches(grid, job.max_patches, job.config, "video")


def _frames(job: DecodeJob) -> Iterator[Pixels]:
    for number, source in enumerate(job.sources):
        try:
            yield _picture(source, job)
        except MediaError as error:
            raise type(error)(f"frame {number}: {error}") from error


def answer(job: DecodeJob) -> Reply:
    """Do a job; every error that the client caused, and lack of memory, becomes a Failed."""
    try:
        processed = process(job)
        put(Path(job.folder), processed.patches, job.name)
    except MediaTooLargeError as error:
        return Failed("too_large", str(error))
    except MediaError as error:
        return Failed("media", str(error))
    except MemoryError:
        return Failed("too_large", "decoding it takes more memory than a decoding process may use")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return Failed("overloaded", "no room in shared memory for the decoded medium; try again later")
    return Decoded(
        grid=processed.grid,
        content_hash=content_hash(processed, job.config),
        seconds_per_grid=processed.seconds_per_grid,
        timestamps=processed.timestamps,
    )


def limit_memory(num_bytes: int) -> None:
    """Allocations beyond fail in this process instead of costing the machine its memory; no core files either."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def send(stream: BinaryIO, reply: Reply) -> None:
    message = msgspec.msgpack.encode(reply)
    stream.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)
    stream.flush()


def main() -> None:
    """Answer jobs until the parent closes the pipe."""
    jobs = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the replies
    limit_memory(int(sys.argv[1]) << 20)
    warnings.simplefilter("ignore")  # of a client's bytes; what is wrong with them goes into the answer
    decoder = msgspec.msgpack.Decoder(DecodeJob)
    send(replies, Ready())
    while length := jobs.read(LENGTH_BYTES):
        send(replies, answer(decoder.decode(jobs.read(int.from_bytes(length, "big")))))


if __name__ == "__main__":
    main()
