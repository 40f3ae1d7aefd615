"""``synthesize`` renders the embedded garments as shards, ``pretrain`` the towers that start from others of them."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from fashionclip_tune.errors import UserError
from fashionclip_tune.progress import messages_on, progress_bar


def add_synthesize(commands: Any) -> None:
    about = "renders the embedded garments as shards"
    parser = commands.add_parser("synthesize", help=about, description=f"{about.capitalize()}, to try things out on.")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty")
    add("--num-products", type=int, default=2_000, metavar="N", help="products of all splits (default: %(default)s)")
    add("--views-per-product", type=int, default=3, metavar="N", help="photos a product (default: %(default)s)")
    add("--image-size", type=int, default=64, metavar="N", help="pixels a side (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the garments that are drawn (default: %(default)s)")
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
    about = "makes the weights that the tiny models start from (a sweep does it too)"
    parser = commands.add_parser("pretrain", help=about, description=f"{about.capitalize()}.")
    parser.set_defaults(run=_pretrain)


def _pretrain(parsed: argparse.Namespace) -> None:
    from fashionclip_tune.models.tiny import TINY_MODELS, pretrained_tiny_dir
    from fashionclip_tune.training.pretraining import pretrain_missing

    with messages_on(Console()):
        pretrain_missing(TINY_MODELS)
    for name in TINY_MODELS:
        print(f"{name}: {pretrained_tiny_dir(name)}")
