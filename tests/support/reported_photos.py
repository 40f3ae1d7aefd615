"""Photos as catalogues have them, and as the report on the data takes them."""

import io
import random

from PIL import Image, ImageDraw

from fashionclip_tune.prepare.data_report import ReportedPhoto
from fashionclip_tune.prepare.photo_encoding import ImageHashes, image_hashes


def product_photo(seed: int) -> Image.Image:
    """Shapes on white, as catalogues have them."""
    rng = random.Random(seed)
    image = Image.new("RGB", (120, 160), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        left, top = rng.randrange(10, 70), rng.randrange(10, 100)
        box = (left, top, left + rng.randrange(10, 50), top + rng.randrange(10, 60))
        draw.ellipse(box, fill=tuple(rng.randrange(220) for _ in range(3)))
    return image


def as_jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def photo(number: int, split: str = "train", *, captions: tuple[str, ...] = ("A red shirt",), **given: object) -> ReportedPhoto:
    """``given``: ``product`` or ``hashes`` where they are not the photo's own."""
    hashes = given.get("hashes") or image_hashes(as_jpeg(product_photo(number)))
    assert isinstance(hashes, ImageHashes)
    return ReportedPhoto(f"{number}.jpg", split, str(given.get("product", number)), captions, hashes)
