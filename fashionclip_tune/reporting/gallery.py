"""A model's answers to look at: captions with the ten photos it finds for them, as small JPEGs inside the page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import run_shards, storage_of
from fashionclip_tune.errors import BadDataError, UserError
from fashionclip_tune.evaluation.dataset import EvaluationSet, evaluation_set
from fashionclip_tune.evaluation.encode import embed
from fashionclip_tune.evaluation.examples import as_jpeg, fixed_queries, thumbnail, top_photos
from fashionclip_tune.evaluation.protocols import Pool, retrieve
from fashionclip_tune.models.named_model import exported_trial, named_model
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.progress import OnProgress, no_progress
from fashionclip_tune.reporting.sweep_files import TrialRow
from fashionclip_tune.storage.checkpoint import newest_weights

TOP = 10
_THUMBNAIL, _QUALITY = 112, 72
_NUM_FIXED, _NUM_MISSES, _NUM_DISAGREEING = 6, 5, 5


@dataclass(frozen=True)
class Shown:
    """A photo of an answer: its JPEG, whether it is the photo asked for, or another one of its product."""

    jpeg: bytes
    is_photo: bool
    is_product: bool

    @property
    def data_uri(self) -> str:
        """For the address of an image in HTML."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


@dataclass(frozen=True)
class Query:
    """A caption, its photo, the rank at which the model finds it (1 is first), and its ten answers."""

    caption: str
    photo: Shown
    rank: int
    answers: tuple[Shown, ...]


@dataclass(frozen=True)
class Gallery:
    """``fixed`` are spread evenly over the photos; ``disagreeing``: another photo of the product is among the ten, not this."""

    trial_id: str
    num_photos: int
    fixed: tuple[Query, ...]
    misses: tuple[Query, ...]
    disagreeing: tuple[Query, ...]


def make_gallery(
    sweep_dir: Path, best: TrialRow, on_progress: OnProgress = no_progress, *, allow_remote: bool = False
) -> Gallery:
    """Encodes the validation photos with the weights of a sweep's best trial, which takes as long as one evaluation.

    Args:
        allow_remote: URLs and commands that the trial read its photos from are followed.

    Raises:
        UserError: weights or data are not there, or cannot be used any more.
    """
    folders = list(sweep_dir.glob(f"trials/{best['trial_id']}-*"))
    if not folders:
        raise UserError(f"the folder of trial {best['trial_id']} is not in {sweep_dir}")
    # On the durable side of a sweep, such as a drive, trials have no checkpoints: there the winner has a folder of its own.
    has_weights = newest_weights(folders[0]) is not None or exported_trial(sweep_dir / "best") != best["trial_id"]
    caller = ProjectConfig().with_overrides({"reading.allow_remote": allow_remote})
    found = named_model(str(folders[0] if has_weights else sweep_dir / "best"), caller)
    config = found.started_from
    if config is None:
        raise UserError(f"{folders[0]} does not say how it was trained: config.json is missing or cannot be read")
    plan = plan_precision(config)
    found.loaded.network.to(plan.device)
    try:
        photos = evaluation_set(run_shards(config).valid, found.loaded.preprocessing, storage_of(config))
        pool, bad, _ = embed(
            found.loaded,
            photos,
            all_captions=False,
            batch_size=config.evaluation.batch_size,
            plan=plan,
            max_bad_share=config.training.max_bad_share,
            on_progress=on_progress,
        )
    except (BadDataError, OSError) as error:
        raise UserError(f"the photos of {config.dataset_dir} cannot be read: {error}") from error
    unreadable = {sample.key for sample in bad}
    readable = [place for place, key in enumerate(photos.reader.index.keys.tolist()) if key not in unreadable]
    return _chosen(best["trial_id"], photos, torch.tensor(readable[: len(pool.products_N)]), pool)


def _chosen(trial_id: str, photos: EvaluationSet, readable_N: Tensor, pool: Pool) -> Gallery:
    captions_N = pool.caption_rows_NK[:, 0]
    top_NK = top_photos(pool, torch.arange(len(captions_N)), TOP)
    ranks_N = retrieve(pool, RetrievalProtocol.INSTANCE).text_to_image.ranks.expected_rank()
    own_N1 = torch.arange(len(captions_N))[:, None]
    finds_photo_N = (top_NK == own_N1).any(1)
    finds_product_N = (pool.products_N[top_NK] == pool.products_N[:, None]).any(1)
    thumbnails: dict[int, bytes] = {}

    def shown(photo: int, query: int) -> Shown:
        if photo not in thumbnails:
            encoded = photos.reader.image(int(readable_N[photo]))
            thumbnails[photo] = as_jpeg(thumbnail(encoded, _THUMBNAIL), _QUALITY)
        same_product = bool(pool.products_N[photo] == pool.products_N[query])
        return Shown(thumbnails[photo], photo == query, same_product)

    def queries(numbers: Sequence[int]) -> tuple[Query, ...]:
        return tuple(
            Query(
                caption=photos.captions[int(captions_N[query])],
                photo=shown(query, query),
                rank=max(1, round(float(ranks_N[query]))),
                answers=tuple(shown(photo, query) for photo in top_NK[query].tolist()),
            )
            for query in numbers
        )

    worst = [query for query in torch.argsort(ranks_N, descending=True, stable=True).tolist() if not finds_photo_N[query]]
    misses = _of_distinct_captions([query for query in worst if not finds_product_N[query]], captions_N, _NUM_MISSES)
    disagreeing = _of_distinct_captions([query for query in worst if finds_product_N[query]], captions_N, _NUM_DISAGREEING)
    try:
        return Gallery(
            trial_id=trial_id,
            num_photos=len(captions_N),
            fixed=queries(fixed_queries(len(captions_N), _NUM_FIXED)),
            misses=queries(misses),
            disagreeing=queries(disagreeing),
        )
    finally:
        photos.reader.close()


def _of_distinct_captions(queries: Sequence[int], captions_N: Tensor, count: int) -> list[int]:
    """The first ``count`` of the queries, one a caption: photos of a product share theirs and would fill the page."""
    first: dict[int, int] = {}
    for query in queries:
        first.setdefault(int(captions_N[query]), query)
    return list(first.values())[:count]
