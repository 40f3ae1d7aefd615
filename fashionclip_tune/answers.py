"""What a model finds first for a few captions, and the photos in small: for the eyes, beside the figures."""

import io

import torch
from PIL import Image
from torch import Tensor

from fashionclip_tune.protocols import Pool
from fashionclip_tune.reader import decode_pil

_QUERIES_AT_A_TIME = 1024


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
    """An encoded photo, at most ``side`` pixels wide and high, on a white square."""
    photo = decode_pil(encoded)
    photo.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    return square


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality, optimize=True)
    return written.getvalue()
