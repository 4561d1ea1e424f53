"""Pictures with known content: coloured shapes and printed words on plain, graded, noisy or photo-like backgrounds."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Rng: TypeAlias = np.random.Generator
Pixels: TypeAlias = npt.NDArray[np.uint8]

PATCH = 14
CELL = 28  # one merged token: two by two patches
SHAPE_SIZES = ((84, 84), (112, 84), (84, 112), (112, 112))
TEXT_SIZES = ((112, 84), (84, 84))
OVERSAMPLE = 2

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "green": (36, 158, 58),
    "blue": (36, 76, 214),
    "yellow": (242, 218, 36),
    "orange": (246, 132, 20),
    "purple": (140, 48, 172),
    "black": (18, 18, 18),
    "white": (246, 246, 246),
}
WORDS = (
    "CAT DOG SUN CAR BUS TREE FISH BIRD BOOK DOOR HAND SHIP RAIN SNOW BOAT CAKE MILK SALT HOME FARM "
    "OPEN STOP EXIT SALE FREE TAXI CAFE BANK PARK ZOO YES NO HOT COLD HELP EGG KEY LOVE GOLD QUIZ"
).split()
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
KINDS = ("none", *SHAPES, *CHARS)  # what may stand in a patch
COLOUR_NAMES = ("none", *COLOURS)
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

FONT_DIRS = (Path("/usr/share/fonts"),)
# Debian packages: fonts-dejavu-core (also inside matplotlib), fonts-liberation, fonts-lato, fonts-open-sans,
# fonts-freefont-ttf
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "LiberationSans-Bold",
    "LiberationSans-Regular",
    "Lato-Bold",
    "Lato-Heavy",
    "OpenSans-Bold",
    "OpenSans-Semibold",
    "FreeSansBold",
)
# Debian packages: fonts-roboto-unhinted, fonts-cantarell
HELD_OUT_FONTS = ("Roboto-Bold", "Roboto-Medium", "Cantarell-Bold")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape or a printed text; `x`, `y` (its centre) and `size` (its height) in pixels."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    font: str = ""

    @property
    def is_text(self) -> bool:
        return self.kind not in SHAPES


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture of `width` by `height` pixels shows, in reading order."""

    width: int
    height: int
    things: tuple[Thing, ...]

    def row(self, thing: Thing) -> str:
        return ROWS[min(2, int(3 * thing.y / self.height))]

    def column(self, thing: Thing) -> str:
        return COLUMNS[min(2, int(3 * thing.x / self.width))]

    def place(self, thing: Thing) -> str:
        """One of nine places in words, such as "top left", "right" or "centre"."""
        row, column = self.row(thing), self.column(thing)
        if row == "middle":
            return column
        return row if column == "centre" else f"{row} {column}"

    def in_reading_order(self) -> Scene:
        key = {thing: (ROWS.index(self.row(thing)), thing.x) for thing in self.things}
        return replace(self, things=tuple(sorted(self.things, key=lambda thing: key[thing])))

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.is_text)

    @property
    def text(self) -> Thing | None:
        return next((thing for thing in self.things if thing.is_text), None)


@lru_cache(maxsize=1)
def font_files() -> dict[str, Path]:
    """Installed font files by stem; DejaVu is taken from matplotlib where the system has none."""
    import matplotlib

    folders = (*FONT_DIRS, Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    return {path.stem: path for folder in folders for path in sorted(folder.rglob("*.[to]tf"))}


@lru_cache(maxsize=2048)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    files = font_files()
    if name not in files:
        raise FileNotFoundError(
            f"font {name} is not installed; see tools/demo_model/README.md for the packages it comes in"
        )
    return ImageFont.truetype(files[name], size)


@lru_cache(maxsize=65536)
def text_box(font: str, text: str) -> tuple[float, float, float, float]:
    """Ink box of a text at 100 pixels."""
    return load_font(font, 100).getbbox(text)


def outline(kind: str, x: float, y: float, size: float, angle: float) -> list[tuple[float, float]]:
    """Polygon of a shape that fills a box of `size` pixels."""
    radius = size / 2
    if kind == "square":
        points = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif kind == "triangle":
        points = [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    elif kind == "cross":
        arm = 0.32
        points = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)]
        points += [(arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm)]
    elif kind == "star":
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        points = [(math.cos(t) * r, math.sin(t) * r) for t, r in zip(turns, [1.08, 0.45] * 5, strict=True)]
    elif kind == "heart":
        turns = [2 * math.pi * i / 28 for i in range(28)]
        points = [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in turns
        ]
    else:
        turns = [2 * math.pi * i / 32 for i in range(32)]
        points = [(math.cos(t), math.sin(t)) for t in turns]
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos)) for px, py in points]


def jittered(rng: Rng, colour: str) -> tuple[int, int, int]:
    limit = 14 if colour in ("black", "white") else 22
    red, green, blue = (int(np.clip(value + rng.integers(-limit, limit + 1), 0, 255)) for value in COLOURS[colour])
    return red, green, blue


def background(rng: Rng, width: int, height: int, inks: list[tuple[int, int, int]], hardness: float) -> Image.Image:
    """A greyish or pale picture that every ink stands out from; patterns grow with `hardness` in 0..1."""
    wanted = 190 if len(inks) > 1 else 260
    for _ in range(40):
        base = rng.uniform(15, 245) + rng.uniform(-28, 28, 3)
        if min((float(np.abs(base - np.array(ink)).sum()) for ink in inks), default=999.0) > wanted:
            break
    base = np.clip(base, 0, 255)
    pattern = rng.random()
    if pattern > 0.25 + 0.6 * hardness:
        return Image.new("RGB", (width, height), tuple(int(value) for value in base))
    grid = (2, 2) if pattern < 0.3 * hardness else (5, 5)
    blobs = np.clip(base + rng.uniform(-1, 1, (*grid, 3)) * rng.uniform(8, 30), 0, 255).astype(np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def damage(rng: Rng, picture: Image.Image, hardness: float) -> Image.Image:
    """Sensor noise and JPEG artefacts on some pictures."""
    if rng.random() < 0.5 * hardness:
        noise = rng.normal(0, rng.uniform(2, 10), (picture.height, picture.width, 3))
        picture = Image.fromarray(np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.3 * hardness:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(45, 90)))
        picture = Image.open(buffer).convert("RGB")
    return picture


def char_boxes(thing: Thing) -> list[tuple[float, float, float, float]]:
    """Boxes in picture pixels of the glyphs of a text."""
    font = load_font(thing.font, round(thing.size * OVERSAMPLE))
    left, top, right, bottom = font.getbbox(thing.kind)
    start_x, start_y = thing.x * OVERSAMPLE - (left + right) / 2, thing.y * OVERSAMPLE - (top + bottom) / 2
    boxes = []
    for i, char in enumerate(thing.kind):
        offset = font.getlength(thing.kind[:i])
        x0, y0, x1, y1 = font.getbbox(char)
        box = (start_x + offset + x0, start_y + y0, start_x + offset + x1, start_y + y1)
        boxes.append((box[0] / OVERSAMPLE, box[1] / OVERSAMPLE, box[2] / OVERSAMPLE, box[3] / OVERSAMPLE))
    return boxes


def draw_thing(rng: Rng, draw: ImageDraw.ImageDraw, thing: Thing, ink: tuple[int, int, int]) -> None:
    if not thing.is_text:
        points = outline(thing.kind, thing.x, thing.y, thing.size, thing.angle)
        draw.polygon([(px * OVERSAMPLE, py * OVERSAMPLE) for px, py in points], fill=ink)
        return
    font = load_font(thing.font, round(thing.size * OVERSAMPLE))
    left, top, right, bottom = font.getbbox(thing.kind)
    corner = (thing.x * OVERSAMPLE - (left + right) / 2, thing.y * OVERSAMPLE - (top + bottom) / 2)
    draw.text(corner, thing.kind, fill=ink, font=font)


def render(rng: Rng, scene: Scene, hardness: float) -> Pixels:
    """Picture [height, width, 3] of a scene."""
    inks = [jittered(rng, thing.colour) for thing in scene.things]
    large = background(rng, scene.width * OVERSAMPLE, scene.height * OVERSAMPLE, inks, hardness)
    draw = ImageDraw.Draw(large)
    for thing, ink in zip(scene.things, inks, strict=True):
        draw_thing(rng, draw, thing, ink)
    return np.asarray(damage(rng, large.reduce(OVERSAMPLE), hardness))


@dataclass(frozen=True, slots=True)
class CellLabels:
    """What stands where, for the extra heads: per patch [rows, columns], and per cell whose thing's centre it holds."""

    kind: npt.NDArray[np.int64]
    colour: npt.NDArray[np.int64]
    centre: npt.NDArray[np.int64]  # [cell rows, cell columns, 4]: kind (text is len(SHAPES) + 1), colour, row, column


def cell_labels(scene: Scene) -> CellLabels:
    stencil = Image.new("L", (scene.width, scene.height), 0)
    draw = ImageDraw.Draw(stencil)
    owners: list[tuple[int, int]] = [(0, 0)]
    centre = np.zeros((scene.height // CELL, scene.width // CELL, 4), np.int64)
    for thing in scene.things:
        colour = COLOUR_NAMES.index(thing.colour)
        if thing.is_text:
            for char, box in zip(thing.kind, char_boxes(thing), strict=True):
                draw.rectangle(box, fill=len(owners))
                owners.append((KINDS.index(char), colour))
        else:
            draw.polygon(outline(thing.kind, thing.x, thing.y, thing.size, thing.angle), fill=len(owners))
            owners.append((KINDS.index(thing.kind), colour))
        cell = (int(thing.y) // CELL, int(thing.x) // CELL)
        kind = len(SHAPES) + 1 if thing.is_text else 1 + SHAPES.index(thing.kind)
        centre[cell] = (kind, colour, 1 + ROWS.index(scene.row(thing)), 1 + COLUMNS.index(scene.column(thing)))
    ids = np.asarray(stencil)
    rows, columns = scene.height // PATCH, scene.width // PATCH
    tiles = ids.reshape(rows, PATCH, columns, PATCH).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
    marked = tiles.astype(np.int64) + len(owners) * np.arange(rows * columns).reshape(rows, columns, 1)
    covered = np.bincount(marked.ravel(), minlength=rows * columns * len(owners)).reshape(rows, columns, -1)
    covered[..., 0] = 14  # a patch belongs to a thing that covers more of its 196 pixels than this
    owner = np.array(owners)[covered.argmax(-1)]
    return CellLabels(owner[..., 0], owner[..., 1], centre)


def size_of(rng: Rng, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The first size for over half of the pictures, else any other."""
    return sizes[0] if rng.random() < 0.55 else sizes[1 + int(rng.integers(len(sizes) - 1))]


def free_spots(rng: Rng, width: int, height: int, num_things: int) -> list[tuple[float, float, float]]:
    """(x, y, largest size) on a three by three layout with jitter, so that every place has a clear name."""
    spots = rng.permutation(9)[:num_things]
    found = []
    for spot in spots:
        alone = num_things == 1 and rng.random() < 0.6
        size = min(width, height) * (0.64 if alone and spot == 4 else 0.42 if alone else 0.325)
        jitter = 0.0 if num_things > 4 or size > 30 else 3.0
        x = width * (spot % 3 + 0.5) / 3 + rng.uniform(-jitter, jitter)
        y = height * (spot // 3 + 0.5) / 3 + rng.uniform(-jitter, jitter)
        found.append((x, y, size))
    return found


def random_shapes(rng: Rng, width: int, height: int, num_things: int, hardness: float) -> Scene:
    """Shapes of different places; equal kinds and colours are likely enough to make counting a question."""
    few_kinds = rng.permutation(len(SHAPES))[: rng.integers(1, 3)]
    things = []
    repeat = rng.random() < 0.35
    for x, y, largest in free_spots(rng, width, height, num_things):
        kind = SHAPES[int(rng.choice(few_kinds) if repeat else rng.integers(len(SHAPES)))]
        colour = str(rng.choice(list(COLOURS)))
        size = largest * rng.uniform(0.74, 1.0)
        angle = rng.uniform(-0.26, 0.26) * hardness
        things.append(Thing(kind, colour, x, y, size, angle))
    return Scene(width, height, tuple(things)).in_reading_order()


def random_text(rng: Rng, text: str, width: int, height: int, fonts: tuple[str, ...], with_shape: bool) -> Scene:
    """A text that fills the width of the middle row, a cell for each character, perhaps with a shape above or below."""
    font = str(rng.choice(fonts))
    left, top, right, bottom = text_box(font, text)
    room = CELL * max(len(text), 1.3) * rng.uniform(0.84, 0.96)
    size = min(room / ((right - left) / 100), (0.31 if with_shape else 0.39) * height / ((bottom - top) / 100))
    x, y = width / 2 + rng.uniform(-2.5, 2.5), height / 2 + rng.uniform(-3, 3)
    things = [Thing(text, str(rng.choice(list(COLOURS))), x, y, size, font=font)]
    if with_shape:
        spot = (width * (rng.integers(3) + 0.5) / 3, height * float(rng.choice([1, 5])) / 6)
        big = height / 3 * rng.uniform(0.76, 0.92)
        things.append(Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), *spot, size=big))
    return Scene(width, height, tuple(things)).in_reading_order()


def string_length(rng: Rng, width: int) -> int:
    """As many characters as a picture has cells across, or fewer where that is three."""
    return width // CELL if width > 84 else int(rng.choice([1, 2, 3], p=[0.3, 0.3, 0.4]))


def random_string(rng: Rng, width: int) -> str:
    """A word of the list or a number below a hundred, to fill a picture of `width` pixels."""
    length = string_length(rng, width)
    if length == 1 or (length == 2 and rng.random() < 0.9):
        return str(rng.integers(10 ** (length - 1) - (length == 1), 10**length))
    return str(rng.choice([word for word in WORDS if len(word) == length]))


def random_letters(rng: Rng, width: int) -> str:
    """Any letters and digits as often as what `random_string` gives."""
    if rng.random() < 0.5:
        return random_string(rng, width)
    return "".join(CHARS[i] for i in rng.integers(0, len(CHARS), string_length(rng, width)))
