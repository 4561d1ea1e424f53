"""Bar charts and receipts: simple figures whose content is known."""

from __future__ import annotations

from PIL import Image, ImageDraw

from demo_model.scenes import CELL, COLOURS, OVERSAMPLE, WORDS, Rng, jittered, load_font, text_box

PAPER = (248, 246, 240)
INK = (30, 30, 34)


def draw_chart(rng: Rng, width: int, height: int) -> tuple[Image.Image, list[tuple[str, float]]]:
    """Two to four bars of different colours and clearly different heights; the bars as (colour, height in pixels)."""
    num_bars = int(rng.integers(2, 5))
    options = [colour for colour in COLOURS if colour != "white"]
    colours = [options[i] for i in rng.permutation(len(options))[:num_bars]]
    steps = rng.permutation(4)[:num_bars]
    room, base = height * 0.78, height * 0.92
    bars = [(colour, room * (0.3 + 0.7 * step / 3)) for colour, step in zip(colours, steps, strict=True)]
    shade = int(rng.integers(222, 256))
    large = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE), (shade, shade, shade))
    draw = ImageDraw.Draw(large)
    pitch = 0.88 * width / num_bars
    for i, (colour, tall) in enumerate(bars):
        left = 0.09 * width + (i + 0.14) * pitch
        box = (left, base - tall, left + pitch * 0.72, base)
        draw.rectangle([value * OVERSAMPLE for value in box], fill=jittered(rng, colour))
    axis = [(0.07 * width, 0.06 * height), (0.07 * width, base), (0.97 * width, base)]
    draw.line([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in axis], fill=INK, width=OVERSAMPLE)
    return large.reduce(OVERSAMPLE), bars


def draw_receipt(rng: Rng, width: int, height: int, font: str) -> tuple[Image.Image, int]:
    """Lines of an item and its price, a rule, and the total in figures of a cell each; returns the total."""
    num_lines = int(rng.integers(1, 3))
    prices = [int(rng.integers(5, 49)) for _ in range(num_lines)]
    large = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE), PAPER)
    draw = ImageDraw.Draw(large)
    small = load_font(font, round(0.42 * CELL * OVERSAMPLE))
    for i, price in enumerate(prices):
        middle = (CELL * (i + 0.5) + 6) * OVERSAMPLE
        draw.text((4 * OVERSAMPLE, middle), str(rng.choice(WORDS)), fill=INK, font=small, anchor="lm")
        draw.text(((width - 4) * OVERSAMPLE, middle), str(price), fill=INK, font=small, anchor="rm")
    rule = (height - 1.5 * CELL + rng.uniform(-2, 2)) * OVERSAMPLE
    draw.line([(3 * OVERSAMPLE, rule), ((width - 3) * OVERSAMPLE, rule)], fill=INK, width=OVERSAMPLE)
    total = str(sum(prices))
    draw_total(draw, total, width, height, font, rng)
    return large.reduce(OVERSAMPLE), int(total)


def squeezed(rng: Rng, receipt: Image.Image) -> Image.Image:
    """The receipt narrower or wider, its right edge in place: figures of other fonts fall elsewhere into the cells."""
    width = round(receipt.width * rng.uniform(0.86, 1.1))
    shown = Image.new("RGB", receipt.size, PAPER)
    shown.paste(receipt.resize((width, receipt.height), Image.Resampling.BICUBIC), (receipt.width - width, 0))
    return shown


def draw_total(draw: ImageDraw.ImageDraw, total: str, width: int, height: int, font: str, rng: Rng) -> None:
    """The total in the last row, at its right end."""
    _, top, _, bottom = text_box(font, total)
    size = 0.74 * CELL / ((bottom - top) / 100) * rng.uniform(0.92, 1.04)
    corner = ((width - 4) * OVERSAMPLE, (height - 0.55 * CELL) * OVERSAMPLE)
    draw.text(corner, total, fill=INK, font=load_font(font, round(size * OVERSAMPLE)), anchor="rm")
