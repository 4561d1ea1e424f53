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
import time
import warnings
from pathlib import Path
from typing import BinaryIO

import msgspec

from dashinfer_vlm.errors import MediaError, MediaTooLargeError
from dashinfer_vlm.media.registry import MEDIA
from dashinfer_vlm.media.wire import LENGTH_BYTES, NO_ROOM, Decoded, DecodeJob, Failed, Ready, Reply
from dashinfer_vlm.processors.qwen import Processed, ProcessorConfig
from dashinfer_vlm.shared_array import put


def process(job: DecodeJob) -> Processed:
    """Decode and turn into features. Raises MediaError for what cannot be used."""
    medium = MEDIA[job.kind]
    return medium.decode_parts(job.sources, job.terms) if job.in_parts else medium.decode(job.sources[0], job.terms)


def content_hash(processed: Processed, config: ProcessorConfig) -> bytes:
    """32 bytes: what the encoder sees, and all that decides what it makes of it.

    Over the features (pixels after decoding and resizing), so that the same image in another file is the same content,
    and over the grid and the settings, so that equal bytes in another shape are not.
    """
    shape = (config.patch_size, config.temporal_patch_size, config.merge_size, config.image_mean, config.image_std)
    settings = repr((1, processed.grid, processed.seconds_per_grid, config.rescale_factor, *shape))
    digest = hashlib.sha256(settings.encode())
    digest.update(processed.features.data)
    return digest.digest()


def answer(job: DecodeJob) -> Reply:
    """Do a job; every error that the client caused, and lack of memory, becomes a Failed."""
    start_s = time.perf_counter()
    try:
        processed = process(job)
        decoded_s = time.perf_counter() - start_s - processed.cost_s
        put(Path(job.folder), processed.features, job.name)
    except MediaTooLargeError as error:
        return Failed("too_large", str(error))
    except MediaError as error:
        return Failed("media", str(error))
    except MemoryError:
        return Failed("too_large", "decoding it takes more memory than a decoding process may use")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return Failed("no_room", NO_ROOM)
    digest = content_hash(processed, job.terms.config)
    return Decoded(
        grid=processed.grid,
        content_hash=digest,
        seconds_per_grid=processed.seconds_per_grid,
        timestamps=processed.timestamps,
        decode_s=decoded_s,
        preprocess_s=time.perf_counter() - start_s - decoded_s,
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
