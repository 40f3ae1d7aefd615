"""Draws one garment as two images, its cloth and its silhouette; ``synthetic`` makes photos of them.

Lengths are in garment units: x from the middle to both sides, y down from the neck or waistband.
"""

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fashionclip_tune.synthetic.garments import COLOURS, KINDS, Colour, Garment

Point = tuple[float, float]

_SLEEVE_REACH = {"short sleeve": 0.38, "three-quarter sleeve": 0.68, "long sleeve": 1.0}
_Half = tuple[Point, ...]  # the right half of something symmetric
# neckline -> the edge of the opening, from the shoulder to the middle, and the outline of the collar
_NECKLINES: dict[str, tuple[_Half, _Half]] = {
    "crew neck": (((7.5, -1), (6.5, 3), (4, 5.5), (0, 6.5)), ()),
    "v-neck": (((8, -1), (0, 21)), ()),
    "scoop neck": (((10, -1), (9.5, 6), (6, 12.5), (0, 15)), ()),
    "boat neck": (((14, -1), (9, 4), (0, 5)), ()),
    "square neck": (((10, -1), (10, 13), (0, 13)), ()),
    "turtleneck": ((), ((0, -8), (7.5, -8), (9, 2), (0, 4))),
    "hooded": ((), ((0, -13), (7, -11.5), (13, -4), (12, 5), (6, 10), (0, 11))),
    "classic collar": (((5, -4), (0, 6)), ((0, 5), (6, -4), (10, 0), (8, 12))),
    "stand collar": ((), ((0, 2), (7, -5), (9, 2), (0, 7))),
    "lapel": (((6, -1), (0, 22)), ((6, -1), (11, 1), (13, 13), (9, 14), (0, 29), (0, 22))),
}


def garment_images(g: Garment, rng: random.Random, side: int) -> tuple[Image.Image, Image.Image]:
    """The garment as cloth (RGB, all over the image) and its silhouette (L), squares of ``side`` pixels."""
    kind = KINDS[g.kind]
    hem = kind.hems[g.length]
    # A long garment is seen from further away; the floors are what sleeves and wide legs need.
    frame = max(hem + 22, 88 if g.neckline else 68)
    red, green, blue = (max(0, min(255, value + rng.randint(-10, 10))) for value in COLOURS[g.colour])
    colour = (red, green, blue)
    is_dark = sum(colour) < 300
    seam = tinted(colour, 1.35 if is_dark else 0.62)
    accent = COLOURS[g.second_colour or ("white" if is_dark else "black")]
    trim = accent if g.detail in ("contrast trim", "side stripe", "drawstring") else tinted(colour, 0.8)
    mask_image, cloth_image = Image.new("L", (side, side)), Image.new("RGB", (side, side), colour)
    mask, cloth = _Pen(mask_image, frame, hem), _Pen(cloth_image, frame, hem)

    if g.second_colour:
        _draw_pattern(cloth, g.pattern, COLOURS[g.second_colour], rng)
    outline = _outline(g, hem)
    mask.both(outline, 255)
    edged = kind.ribbed or g.detail == "contrast trim"
    if edged:
        cloth.box(-26, hem - 5, 26, hem + 3, trim)
    if g.sleeve in _SLEEVE_REACH:
        _draw_sleeves(g, mask, cloth, seam, trim if edged else None)
    if not g.neckline:
        cloth.box(-20, -1, 20, 4, tinted(colour, 0.85))
    if kind.body in ("legs", "jumpsuit"):
        cloth.line([(0, outline[-1][1] - 18), outline[-1]], seam, 1)
    if g.cut == "pleated":
        for x in range(-12, 13, 4):
            cloth.line([(x, 4), (x * 2.2, hem + 2)], seam, 1.2)
    _draw_closure(g, mask, cloth, hem, seam, accent)
    if g.neckline:
        _draw_neckline(g, mask, cloth, colour, seam, trim)
    _draw_detail(g, cloth, hem, colour, seam, trim)
    return ImageChops.multiply(cloth_image, _folds(rng, side).convert("RGB")), mask_image


class _Pen:
    """Draws on one of a garment's images; ``both`` draws a thing on the right and its mirror image."""

    def __init__(self, image: Image.Image, frame: float, hem: float) -> None:
        self._draw = ImageDraw.Draw(image)
        self._scale = image.width / frame
        self._x, self._y = image.width / 2, (image.height - hem * self._scale) / 2

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [(self._x + x * self._scale, self._y + y * self._scale) for x, y in points]

    def line(self, points: Sequence[Point], ink: Colour | int, width: float) -> None:
        self._draw.line(self._pixels(points), fill=ink, width=max(1, round(width * self._scale)))

    def both(self, points: Sequence[Point], ink: Colour | int, *, line: float = 0) -> None:
        for side in (points, [(-x, y) for x, y in points]):
            if line:
                self.line(side, ink, line)
            else:
                self._draw.polygon(self._pixels(side), fill=ink)

    def box(self, left: float, top: float, right: float, bottom: float, ink: Colour, edge: Colour | None = None) -> None:
        width = max(1, round(self._scale))
        self._draw.rectangle(self._pixels([(left, top), (right, bottom)]), fill=ink, outline=edge, width=width)

    def dot(self, x: float, y: float, radius: float, ink: Colour) -> None:
        self._draw.ellipse(self._pixels([(x - radius, y - radius), (x + radius, y + radius)]), fill=ink)


def tinted(colour: Colour, factor: float) -> Colour:
    """Darker for a factor below 1, closer to white above 1 (so that a seam shows on black too)."""
    r, g, b = (round(v * factor if factor < 1 else v + (255 - v) * (factor - 1)) for v in colour)
    return r, g, b


def _draw_pattern(cloth: _Pen, pattern: str, colour: Colour, rng: random.Random) -> None:
    """Covers the whole cloth; the pitch is the product's own and can still be seen at 32 pixels."""
    pitch = rng.uniform(10, 17)
    steps = [i * pitch - 70 for i in range(math.ceil(200 / pitch))]
    for row, step in enumerate(steps):
        if pattern in ("striped", "checked"):
            cloth.box(-70, step, 70, step + pitch * (0.45 if pattern == "striped" else 0.3), colour)
        if pattern in ("vertical striped", "checked"):
            cloth.box(step, -70, step + pitch * (0.4 if pattern == "vertical striped" else 0.3), 130, colour)
        if pattern == "diagonal striped":
            cloth.line([(2 * step - 100, -70), (2 * step + 100, 130)], colour, pitch * 0.5)
        if pattern == "polka dot":
            for x in steps:
                cloth.dot(x + row % 2 * pitch / 2, step, pitch * 0.28, colour)
    if pattern == "floral":
        for _ in range(60):
            x, y, turn, petal = rng.uniform(-45, 45), rng.uniform(-15, 112), rng.random(), rng.uniform(2, 3.4)
            for angle in (2 * math.pi * (turn + i / 5) for i in range(5)):
                cloth.dot(x + petal * math.cos(angle), y + petal * math.sin(angle), petal * 0.8, colour)
            cloth.dot(x, y, petal * 0.6, COLOURS["yellow"])
    if pattern == "colour block":
        cloth.box(-70, rng.uniform(26, 36), 70, 130, colour)


def _outline(g: Garment, hem: float) -> list[Point]:
    """The right half of the silhouette without sleeves, from the top of the middle line to its bottom."""
    kind, womens = KINDS[g.kind], g.department == "women"
    cut = kind.cuts[g.cut]
    if kind.body == "skirt":
        flared = 13 + (cut - 13) * (0.55 + 0.45 * hem / 80)  # a short skirt has less of the flare
        return [(0, 0), (13, 0), (18, 15) if g.cut == "pencil" else (15, 4), (flared, hem), (0, hem + 1)]
    inner_leg = 3 + hem * 0.045
    if kind.body == "legs":
        return [(0, 0), (15, 0), (18.5 if womens else 17.5, 16), (cut, hem), (inner_leg, hem), (0, 27)]
    chest = 17.5 + (cut - 19) * 0.3 if hem < 80 else 18
    waist = (cut - 1 if cut < 25 else 17) - (3 if womens else 0)
    shoulder: list[Point] = [(13, 2), (12, 12)] if g.sleeve == "sleeveless" else [(8, 0), (20 if womens else 22, 4.5)]
    torso = [(0, 0), *shoulder, (chest, 24)]
    if hem > 50:  # a cropped top ends before it widens again
        torso.append((waist, 40))
    if kind.body == "jumpsuit":
        return [*torso, (18, 54), (cut, hem), (inner_leg, hem), (0, 63)]
    return [*torso, (cut, hem), (0, hem + 1)]


def _draw_sleeves(g: Garment, mask: _Pen, cloth: _Pen, seam: Colour, cuff: Colour | None) -> None:
    reach = _SLEEVE_REACH[g.sleeve]
    shoulder = 20 if g.department == "women" else 22
    x, y = shoulder + 6 + 13 * reach, 4.5 + 54 * reach
    mask.both([(shoulder - 7, 2), (shoulder, 4.5), (x, y), (x - 9.5, y + 3), (16, 26), (14, 14)], 255)
    cloth.both([(shoulder - 2, 4.5), (16.5, 14), (17, 27)], seam, line=1)
    if cuff:
        cloth.both([(x - 11, y - 2), (x - 1, y - 5), (x + 1, y + 1), (x - 9.5, y + 4)], cuff)


def _draw_neckline(g: Garment, mask: _Pen, cloth: _Pen, colour: Colour, seam: Colour, trim: Colour) -> None:
    opening, collar = _NECKLINES[g.neckline]
    if opening:
        mask.both([*opening, (0, -9), (opening[0][0], -9)], 0)
        cloth.both(opening, seam if collar else trim, line=4)
    if collar:
        mask.both(collar, 255)
        cloth.both(collar, tinted(colour, 1.18))
        cloth.both(collar, seam, line=1)
    if g.neckline == "hooded":
        cloth.dot(0, 0, 8, tinted(colour, 0.45))
        cloth.both([(4, 7), (4, 17)], trim, line=1.2)


def _draw_closure(g: Garment, mask: _Pen, cloth: _Pen, hem: float, seam: Colour, button: Colour) -> None:
    opening, _ = _NECKLINES.get(g.neckline, ((), ()))
    top = opening[-1][1] if opening else 5
    bottom = 24 if "placket" in g.closure else 62 if g.kind == "jumpsuit" else hem
    if g.closure == "open front":
        mask.both([(0, top - 6), (4, hem + 2), (0, hem + 2)], 0)
    elif g.closure.startswith("zip"):
        cloth.line([(0, top), (0, bottom)], seam, 3)
        cloth.line([(0, top), (0, bottom)], (214, 214, 210), 1.4)
    elif g.closure:
        columns, edge = ((-6, 6), 9.0) if g.closure == "double buttons" else ((0,), 2.5)
        cloth.line([(edge, top), (edge, bottom)], seam, 1)
        for y in range(round(top) + 4, round(bottom) - 2, 9):
            for x in columns:
                cloth.dot(x, y, 1.8, button)


def _draw_detail(g: Garment, cloth: _Pen, hem: float, colour: Colour, seam: Colour, trim: Colour) -> None:
    has_top, pocket = bool(g.neckline), tinted(colour, 0.82)
    if g.detail == "chest pocket":
        cloth.box(4.5, 15, 13, 25, pocket, seam)
    elif g.detail == "patch pockets":
        y = min(hem - 16, 56) if has_top else 8
        for x in (-11, 11):
            cloth.box(x - 5, y, x + 5, y + 11, pocket, seam)
    elif g.detail == "kangaroo pocket":
        cloth.both([(0, hem - 23), (7, hem - 23), (12, hem - 8), (0, hem - 8)], pocket)
        cloth.both([(0, hem - 23), (7, hem - 23), (12, hem - 8), (0, hem - 8)], seam, line=1)
    elif g.detail == "belt":
        y = 38 if has_top else 1
        cloth.box(-24, y, 24, y + 5, COLOURS["black" if g.colour in ("brown", "burgundy") else "brown"])
        cloth.box(-2.5, y - 0.5, 2.5, y + 5.5, (226, 200, 120))
    elif g.detail == "side stripe":
        cloth.both([(13, -1), (15, 16), (KINDS[g.kind].cuts[g.cut] - 3, hem)], trim, line=3)
    elif g.detail == "drawstring":
        cloth.both([(1, 2), (2.5, 15)], trim, line=1.6)


def _folds(rng: random.Random, side: int) -> Image.Image:
    """Soft shadows to multiply with: a few creases, and both sides turned away from the light."""
    shade = Image.new("L", (4, 1))
    shade.putdata([200, 250, 255, 210])
    shade = shade.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(shade)
    for _ in range(4):
        x, y = rng.uniform(0.3, 0.7) * side, rng.uniform(0.3, 0.6) * side
        end = (x + rng.uniform(-0.1, 0.1) * side, y + rng.uniform(0.15, 0.35) * side)
        draw.line([(x, y), end], fill=190, width=side // 40 + 1)
    return shade.filter(ImageFilter.BoxBlur(side / 40))
