"""``synthesize`` renders the embedded garments as shards, ``pretrain`` the towers that start from others of them."""

import argparse
from pathlib import Path
from typing import Any

from fashionclip_tune.errors import UserError
from fashionclip_tune.progress import progress_bar


def add_synthesize(commands: Any) -> None:
    parser = commands.add_parser("synthesize", help="renders the embedded garments as shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards, new or empty")
    parser.add_argument("--num-products", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument("--views-per-product", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_synthesize)


def _synthesize(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.synthetic import GarmentRecipe, render_dataset

    if parsed.out.exists() and (not parsed.out.is_dir() or any(parsed.out.iterdir())):
        raise UserError(f"--out {parsed.out} is not an empty folder: choose another")
    recipe = GarmentRecipe(
        num_products=parsed.num_products,
        views_per_product=parsed.views_per_product,
        image_size=parsed.image_size,
        seed=parsed.seed,
    )
    with progress_bar("rendering garments") as on_progress:
        render_dataset(parsed.out, recipe, on_progress=on_progress)
    print(f"{parsed.num_products} products with {parsed.views_per_product} photos each written to {parsed.out}")


def add_pretrain(commands: Any) -> None:
    parser = commands.add_parser("pretrain", help="makes the weights that the tiny models start from (a sweep does it too)")
    parser.set_defaults(run=_pretrain)


def _pretrain(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.models.tiny import TINY_MODELS, pretrained_tiny_dir
    from fashionclip_tune.training.pretraining import pretrain_missing

    pretrain_missing(TINY_MODELS, print)
    for name in TINY_MODELS:
        print(f"{name}: {pretrained_tiny_dir(name)}")
