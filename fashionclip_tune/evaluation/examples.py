"""What a model finds first for a few captions, and the photos in small: for the eyes, beside the figures."""

import io
import unicodedata
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fashionclip_tune.data.reader import decode_pil
from fashionclip_tune.evaluation.protocols import Pool

_QUERIES_AT_A_TIME = 1024
# Pixels: around a photo, behind the first one, a caption's line, its letters (TensorBoard shows the sheet at two thirds).
_FRAME, _GAP, _LINE, _LETTERS = 3, 16, 24, 17


def fixed_queries(num_photos: int, count: int) -> list[int]:
    """``count`` photos (or all of fewer) spread evenly: the same ones at every evaluation of the same data."""
    count = min(count, num_photos)
    return [num_photos * number // count for number in range(count)]


def top_photos(pool: Pool, queries_Q: Tensor, count: int) -> Tensor:
    """[Q, count] photos of a pool that are nearest to the first captions of the given ones, nearest first."""
    rows_Q = pool.caption_rows_NK[queries_Q, 0].to(pool.captions_VD.device)
    blocks = [
        (pool.captions_VD[rows_B] @ pool.images_ND.T).topk(min(count, len(pool.images_ND)), dim=1).indices.cpu()
        for rows_B in rows_Q.split(_QUERIES_AT_A_TIME)
    ]
    return torch.cat(blocks)


def thumbnail(encoded: bytes, side: int) -> Image.Image:
    """An encoded photo, whole, in the middle of a white square of ``side`` pixels."""
    photo = decode_pil(encoded)
    # At least a pixel wide, and high: a line of a photo (1 x 30,000 pixels) is one.
    width, height = (max(1, round(edge / max(photo.size) * side)) for edge in photo.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(
        photo.resize((width, height), Image.Resampling.BICUBIC), (round((side - width) / 2), round((side - height) / 2))
    )
    return square


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality, optimize=True)
    return written.getvalue()


def answer_sheet(
    captions: Sequence[str], photos_QK: Sequence[Sequence[Image.Image]], right_QK: Sequence[Sequence[bool]]
) -> bytes:
    """A JPEG with a row a query: its caption, and below it its photos, the first set apart, the right ones in a green frame."""
    side = photos_QK[0][0].width + 2 * _FRAME
    sheet = Image.new("RGB", (side * len(photos_QK[0]) + _GAP, (side + _LINE) * len(photos_QK)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LETTERS)
    for row, (caption, photos, right) in enumerate(zip(captions, photos_QK, right_QK, strict=True)):
        top = row * (side + _LINE)
        plain = "".join(letter for letter in unicodedata.normalize("NFKD", caption) if not unicodedata.combining(letter))
        shown = plain.encode("ascii", "replace").decode()  # what Pillow's own font has
        while draw.textlength(shown, font) > sheet.width - 2 * _FRAME:
            shown = shown.rstrip("…")[:-1] + "…"
        draw.text((_FRAME, top + 2), shown, fill="black", font=font)
        for column, (photo, is_right) in enumerate(zip(photos, right, strict=True)):
            left = column * side + _GAP * (column > 0)
            draw.rectangle(
                (left, top + _LINE, left + side - 1, top + _LINE + side - 1), fill="#00795a" if is_right else "white"
            )
            sheet.paste(photo, (left + _FRAME, top + _LINE + _FRAME))
    return as_jpeg(sheet, 70)
