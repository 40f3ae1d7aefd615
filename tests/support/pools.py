"""Pools of photos and captions with ties, several photos a product and a gallery."""

import torch

from fashionclip_tune.evaluation.protocols import Pool

NUM_CAPTIONS = 60


def pool(num_photos: int = 90, *, num_queries: int | None = None, seed: int = 0, dim: int = 12) -> Pool:
    """Products of about 3 photos that share captions with other products too; one photo in five has one caption only."""
    rng = torch.Generator().manual_seed(seed)
    products = torch.sort(torch.randint(num_photos // 3, (num_photos,), generator=rng)).values
    captions = torch.randn(NUM_CAPTIONS, dim, generator=rng)
    rows = torch.stack([(products * 7) % NUM_CAPTIONS, (products * 11 + 5) % NUM_CAPTIONS, torch.arange(num_photos) % 50], 1)
    rows[::5, 1:] = -1
    is_query = torch.arange(num_photos) < (num_queries or num_photos)
    return Pool(
        images_ND=captions[rows[:, 0]] + torch.randn(num_photos, dim, generator=rng),
        captions_VD=captions,
        caption_rows_NK=rows,
        products_N=products,
        categories_N=products % 2,
        is_query_N=is_query,
    )
