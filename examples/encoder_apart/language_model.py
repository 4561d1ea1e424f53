"""The machine with the language model: takes encoded prompts from a socket and answers them.

    python language_model.py MODEL [--port 5555]

Sees no picture: what stands for it are the embeddings that come with the prompt.
"""

from __future__ import annotations

import argparse
import socket
import tempfile

import numpy as np
import torch
from wire import receive, send

import allspark
from allspark import AsStatus

NAME = "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or id of a checkpoint")
    parser.add_argument("--port", type=int, default=5555, help="0 takes a free one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=0, help="end after so many; 0 goes on")
    arguments = parser.parse_args()

    loader = allspark.HuggingFaceModel(arguments.model, NAME, user_set_data_type=arguments.dtype)
    engine = start_engine(loader, arguments.max_length)
    with socket.create_server(("127.0.0.1", arguments.port)) as server:
        print(f"listening on port {server.getsockname()[1]}", flush=True)  # noqa: T201
        served = 0
        while not arguments.requests or served < arguments.requests:
            connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:
                answer = ask(engine, loader, receive(stream), arguments.max_tokens)
                send(stream, [np.frombuffer(answer.encode(), np.uint8)])
            served += 1
    engine.stop_model(NAME)


def start_engine(loader: allspark.HuggingFaceModel, max_length: int) -> allspark.Engine:
    """Load the model and let it take requests."""
    engine = allspark.Engine()
    device = allspark.TargetDevice.CUDA if torch.cuda.is_available() else allspark.TargetDevice.CPU
    with tempfile.TemporaryDirectory() as folder:
        loader.load_model().serialize(engine, model_output_dir=folder)
        builder = loader.create_reference_runtime_config_builder(NAME, device, [0], max_batch=8)
        checked(engine.install_model(builder.max_length(max_length).build()))
    checked(engine.start_model(NAME))
    return engine


def ask(engine: allspark.Engine, loader: allspark.HuggingFaceModel, arrays: list[np.ndarray], max_tokens: int) -> str:
    """The greedy answer to one encoded prompt."""
    ids, placeholders, positions, *embeddings = arrays
    info = allspark.MultiMediaInfo()
    for placeholder, embedding in zip(placeholders, embeddings, strict=True):
        checked(info.add_multimedia_content(str(placeholder), [embedding]))
    checked(info.add_multimedia_content("positions", [positions]))

    config = allspark.ASGenerationConfigBuilder().do_sample(False).max_length(len(ids) + max_tokens).with_mm_info(info)
    status, handle, queue = engine.start_request_ids(NAME, loader, ids, config)
    checked(status)
    assert handle is not None
    assert queue is not None
    checked(engine.sync_request(NAME, handle))
    elements = queue.Get()
    checked(engine.release_request(NAME, handle))
    text: str = loader.get_tokenizer().decode(elements.ids_from_generate if elements else [])
    return text


def checked(status: AsStatus) -> None:
    """Raise for anything but success."""
    if status != AsStatus.ALLSPARK_SUCCESS:
        raise RuntimeError(f"{status}: {status.message}")


if __name__ == "__main__":
    main()
