"""The embedded data set: drawn garments with a shop's titles, so that a sweep runs with nothing to download.

The attributes of a product are drawn at random; its photos differ in what a photographer changes, its captions in what
a copywriter changes. The collection "pretraining" knows only some of the kinds, colours and patterns and words them
differently, so a model trained on it has something to learn on "sweep".
"""

import hashlib
import io
import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from PIL import Image, ImageChops, ImageFilter

from fashionclip_tune.data.shards import SPLITS, ShardSample, write_dataset_json, write_split
from fashionclip_tune.errors import UserError
from fashionclip_tune.progress import OnProgress, no_progress
from fashionclip_tune.synthetic.captions import write_captions
from fashionclip_tune.synthetic.drawing import garment_images, tinted
from fashionclip_tune.synthetic.garments import Colour, random_garment

COLLECTIONS = ("sweep", "pretraining")
# Part of the cache folder's name: increase it with every change that alters pixels or captions.
RENDERER_VERSION = 1

_LIMITS = {
    "num_products": (10, 999_999),  # ten: each split gets one; at most six digits in a product's id
    "views_per_product": (1, 100),
    "image_size": (16, 512),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, kw_only=True)
class GarmentRecipe:
    """All that the bytes of a synthetic data set depend on, besides the versions of the renderer and of Pillow."""

    collection: str = "sweep"
    num_products: int = 2_000
    views_per_product: int = 3
    image_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.collection not in COLLECTIONS:
            raise UserError(f"collection is {self.collection!r}: it must be one of {', '.join(COLLECTIONS)}")
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UserError(f"{name} is {value!r}: it must be a whole number from {low} to {high}")


def render_dataset(out_dir: Path, recipe: GarmentRecipe, *, on_progress: OnProgress = no_progress) -> None:
    """Writes a data set of three captions per photo, its products split 80/10/10 % into train, valid and test.

    ``on_progress`` is called with the numbers of products done and in total. The same recipe gives the same bytes.
    """
    total = recipe.num_products
    bounds = (0, total - 2 * (total // 10), total - total // 10, total)

    def samples(numbers: range) -> Iterator[ShardSample]:
        for number in numbers:
            yield from _product_samples(recipe, number)
            on_progress(number + 1, total)

    splits = {
        split: write_split(out_dir, split, samples(range(bounds[i], bounds[i + 1])), augmented=True)
        for i, split in enumerate(SPLITS)
    }
    described = ", ".join(f"{name}={value}" for name, value in asdict(recipe).items())
    write_dataset_json(out_dir, splits, source=f"synthetic garments: {described}, renderer {RENDERER_VERSION}")


def cached_dataset(recipe: GarmentRecipe, cache_dir: Path, *, on_progress: OnProgress = no_progress) -> Path:
    """The folder with the recipe's data set below ``cache_dir``, rendered by the first of all processes to ask."""
    identity = json.dumps({**asdict(recipe), "renderer": RENDERER_VERSION}, sort_keys=True)
    parent = cache_dir / "synthetic"
    folder = parent / f"{recipe.collection}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if (folder / "dataset.json").is_file():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f"{folder.name}.lock"):
        if not (folder / "dataset.json").is_file():
            unfinished = parent / f"{folder.name}.tmp"
            # A killed run, or a deletion that was cut short, may have left either folder; the lock makes them ours.
            for leftover in (unfinished, folder):
                if leftover.exists():
                    shutil.rmtree(leftover)
            render_dataset(unfinished, recipe, on_progress=on_progress)
            unfinished.replace(folder)
    return folder


def _product_samples(recipe: GarmentRecipe, number: int) -> Iterator[ShardSample]:
    # A stream of its own for each product: it looks the same however many others there are.
    rng = random.Random(f"{recipe.collection}/{recipe.seed}/{number}")
    garment = random_garment(rng, recipe.collection)
    captions = write_captions(rng, garment, recipe.collection)
    images = garment_images(garment, rng, 2 * recipe.image_size)
    attributes = asdict(garment)
    category = attributes.pop("kind")
    for view in range(recipe.views_per_product):
        yield ShardSample(
            key=f"P{number:06d}_{view}",
            jpeg=_photograph(images, rng, plain_background=recipe.collection == "pretraining"),
            captions=captions,
            product_id=f"P{number:06d}",
            category=category,
            attributes=attributes,
        )


_STUDIOS = [(238, 238, 240), (216, 208, 198), (190, 198, 206), (228, 214, 208), (168, 172, 176), (206, 214, 200)]


def _four_corners(mode: str, corners: Sequence[Colour] | Sequence[int], side: int) -> Image.Image:
    image = Image.new(mode, (2, 2))
    image.putdata(corners)
    return image.resize((side, side), Image.Resampling.BILINEAR)


def _photograph(garment: tuple[Image.Image, Image.Image], rng: random.Random, *, plain_background: bool) -> bytes:
    """One view as a JPEG, with its own pose, background and light, half as large as the garment's images."""
    side = garment[0].width
    studio = (244, 244, 244) if plain_background else rng.choice(_STUDIOS)
    variation = (1.0, 1.0) if plain_background else (0.78, 1.2)
    background = _four_corners("RGB", [tinted(studio, rng.uniform(*variation)) for _ in range(4)], side)

    # A detail shot now and then; otherwise the whole garment with some room around it.
    zoom = rng.uniform(1.15, 1.35) if rng.random() < 0.12 else rng.uniform(0.76, 0.98)
    angle, flip = math.radians(rng.gauss(0, 4)), -1 if rng.random() < 0.3 else 1
    x, y = (side * rng.uniform(0.44, 0.56) for _ in range(2))
    # Image.transform asks where each pixel of the photo comes from, hence the inverse of zoom, angle and shift.
    a, b = math.cos(angle) / zoom, math.sin(angle) / zoom
    pose = (flip * a, flip * b, side / 2 - flip * (a * x + b * y), -b, a, side / 2 + b * x - a * y)
    cloth, mask = (image.transform((side, side), Image.Transform.AFFINE, pose, Image.Resampling.BILINEAR) for image in garment)
    drop = rng.randint(side // 64, side // 24)
    shadow = ImageChops.offset(mask, rng.choice((-drop, drop)), drop).filter(ImageFilter.BoxBlur(side / 40))
    background.paste((90, 90, 95), mask=shadow.point([round(value * 0.4) for value in range(256)]))
    background.paste(cloth, mask=mask)
    photo = background.reduce(2)

    darkest = 0.9 if plain_background else 0.75
    light = _four_corners("L", [round(255 * rng.uniform(darkest, 1)) for _ in range(4)], photo.width)
    # Pillow's own noise is not seeded.
    noise = Image.frombytes("RGB", photo.size, rng.randbytes(photo.width * photo.height * 3))
    photo = Image.blend(ImageChops.multiply(photo, light.convert("RGB")), noise, rng.uniform(0, 0.06))
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()
