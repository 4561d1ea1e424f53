"""A server over a scripted engine as a process of its own: `python scripted_server.py MODEL_FOLDER MAX_FILES`.

It may open MAX_FILES files, prints its port, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dashinfer_vlm.config import ServerConfig
from dashinfer_vlm.frontend.opening import FrontEnd
from dashinfer_vlm.server.run import serve
from tests.frontend.scripted import ScriptedEngine, ScriptedLoader


async def main(folder: Path, max_files: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    front_end = FrontEnd.from_folder(folder)
    service = front_end.service(ScriptedEngine(lambda _: front_end.tokenizer.encode_text("hello")), ScriptedLoader())
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    asyncio.get_running_loop().add_reader(0, os._exit, 0)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    await serve(service, ServerConfig(host="127.0.0.1", log_level="warning"), sockets=[listener])


asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
