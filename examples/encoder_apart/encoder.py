"""The machine with the vision encoder: encodes a question about a picture and sends it to the language model's.

    python encoder.py MODEL HOST PORT PICTURE "What is this?"

Loads the ViT only. Prints the answer that comes back.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import numpy as np
from wire import receive, send

from dashinfer_vlm.offline import Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a checkpoint")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()

    content = [{"type": "image", "image": arguments.picture}, arguments.question]
    with Encoder(arguments.model, dtype=arguments.dtype) as encoder:
        prompt = encoder.encode([{"role": "user", "content": content}])

    with socket.create_connection((arguments.host, arguments.port)) as connection, connection.makefile("rwb") as stream:
        # numpy has no bfloat16: embeddings travel as float32
        embeddings = [embedding.float().cpu().numpy() for embedding in prompt.embeddings]
        send(stream, [np.array(prompt.ids), np.array(prompt.placeholders), prompt.positions.numpy(), *embeddings])
        print(bytes(receive(stream)[0]).decode())  # noqa: T201


if __name__ == "__main__":
    main()
