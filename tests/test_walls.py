"""Where the walls stand: rooms import only from rooms below them, and who needs no torch brings none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "dashinfer_vlm"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("dashinfer",),
    ("allspark",),
    ("cli",),
    ("bench", "offline"),
    ("server",),
    ("frontend",),
    ("engine", "media"),
    ("encoders",),
    ("models",),
    ("layers", "processors"),
    ("kernels",),
)
"""From the roof down; rooms of one floor do not know each other. The modules of the
package's root are the ground: everybody may stand on them, and they stand on nothing but each other."""


WITHOUT_TORCH = (
    "dashinfer_vlm.cli.serve",
    "dashinfer_vlm.engine.client",
    "dashinfer_vlm.engine.host.child",
    "dashinfer_vlm.engine.host.process",
    "dashinfer_vlm.frontend.opening",
    "dashinfer_vlm.frontend.service",
    "dashinfer_vlm.media.decode",
    "dashinfer_vlm.media.loader",
    "dashinfer_vlm.offline.pipes",
    "dashinfer_vlm.server.batches.run",
    "dashinfer_vlm.server.run",
)
"""What the processes of HTTP, of batch files and of decoding import, and the engine's before it loads."""


def imports() -> Iterator[tuple[str, str]]:
    """(module, imported module) for every import of ours, also those inside functions."""
    for file in sorted(SOURCE.rglob("*.py")):
        module = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield module, node.module
            elif isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)


def room(module: str) -> str | None:
    """The package that a module belongs to; "" for the ground, None for what is not ours."""
    head, _, rest = module.partition(".")
    if head in ("allspark", "dashinfer"):
        return head
    if head != PACKAGE:
        return None
    name = rest.split(".")[0]
    return name if (SOURCE / PACKAGE / name).is_dir() else ""


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in (SOURCE / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert rooms | {"allspark", "dashinfer"} == {name for rooms in FLOORS for name in rooms}


def test_imports_point_down() -> None:
    wrong = []
    for module, imported in imports():
        above, below = room(module), room(imported)
        if below in (None, "", above) or module in (PACKAGE, f"{PACKAGE}.__main__"):  # its names, and its command
            continue
        if not above or (floor(above) >= floor(below or "")):
            wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_page_has_the_same_floors_and_the_same_ground() -> None:
    rows = re.findall(r"^\| (?:roof|ground)? ?\| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    rooms = [[name.rstrip("/") for name in re.findall(r"`(\w+/)`", row)] for row in rows[:-1]]
    assert sorted(name for row in rooms for name in row) == sorted(name for names in FLOORS for name in names)
    floors = [[floor(name) for name in row] for row in rooms[1:]]
    assert all(len(set(row)) == 1 for row in floors)
    assert floors == sorted(floors)
    ground = {file.name for file in (SOURCE / PACKAGE).glob("*.py") if not file.name.startswith("__")}
    assert set(re.findall(r"`(\w+\.py)`", rows[-1])) == ground


FIRST_TO_BRING = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    if brought := sorted({"torch", "transformers"} & set(sys.modules)):
        sys.exit(f"{module} brings {', '.join(brought)}")
"""


def test_processes_without_a_model_do_without_torch() -> None:
    command = [sys.executable, "-c", FIRST_TO_BRING, *WITHOUT_TORCH]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
