"""Retrieval metrics of a model on shards: every photo counts, and only the weights change a figure.

Photos and distinct captions are encoded in blocks of one fixed size, the last one padded, because embeddings at different
batch sizes differ in the last bits, enough to break ties.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from fashionclip_tune.answers import fixed_queries, top_photos
from fashionclip_tune.cache import cache_dir
from fashionclip_tune.config import Protocol
from fashionclip_tune.dataset import BadSamples
from fashionclip_tune.evaluation_set import EvaluationSet, pixel_blocks
from fashionclip_tune.files import write_json
from fashionclip_tune.index import BadSample
from fashionclip_tune.model import LoadedModel
from fashionclip_tune.precision import PrecisionPlan
from fashionclip_tune.protocols import KS, Pool, Retrieval, load_retrieval, retrieve, save_retrieval
from fashionclip_tune.statistics import bootstrap_interval

# Of what the zero-shot cache holds: increase it with every change of what a figure means.
_FORMAT = 5
_NUM_SHOWN, _NUM_ANSWERS = 6, 5
_SPREAD_SAMPLE = 1_000

Metrics = dict[str, Any]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` of one protocol, flat; the queries' ranks behind them; what could not be read.

    ``answers``: the photos of a few captions, and the five that the model finds first for each: [photo, first, second...].
    """

    metrics: Metrics
    retrieval: Retrieval
    bad_samples: tuple[BadSample, ...]
    answers: list[list[int]]


def evaluate(
    loaded: LoadedModel,
    photos: EvaluationSet,
    *,
    protocol: Protocol = Protocol.INSTANCE,
    batch_size: int,
    plan: PrecisionPlan,
    max_bad_share: float,
) -> Evaluation:
    """Encodes photos and captions and ranks them under a protocol; see ``describe`` for the metrics.

    Raises:
        BadDataError: more photos than ``max_bad_share`` cannot be read.
        UserError: the protocol needs what the shards do not have.
    """
    pool, bad = embed(
        loaded,
        photos,
        all_captions=protocol is Protocol.ALL_CAPTIONS,
        batch_size=batch_size,
        plan=plan,
        max_bad_share=max_bad_share,
    )
    answers = _answers(pool) if len(pool.products_N) == len(photos) else []  # else numbers do not name photos
    return Evaluation(*describe(pool, protocol), bad, answers)


def _answers(pool: Pool) -> list[list[int]]:
    queries = fixed_queries(int(pool.is_query_N.sum()), _NUM_SHOWN)
    found = top_photos(pool, torch.tensor(queries), _NUM_ANSWERS).tolist()
    return [[query, *photos] for query, photos in zip(queries, found, strict=True)]


def describe(pool: Pool, protocol: Protocol) -> tuple[Metrics, Retrieval]:
    """Ranks a pool under a protocol.

    Returns:
        ``protocol``; ``recall_at_K`` (mean of both directions), ``recall_at_K_text_to_image``, ``recall_at_K_image_to_text``
        for K in 1, 5, 10; ``recall_at_10_low`` and ``_high`` (95 % interval over products); ``median_rank_`` and
        ``mean_rank_`` of both directions; ``num_pairs`` (photos searched for), ``num_products`` of theirs,
        ``num_text_queries``, ``num_image_queries`` (over all draws), ``num_gallery_images``, ``num_gallery_texts``;
        ``similarity_spread`` (0: the embeddings have collapsed).
    """
    retrieval = retrieve(pool, protocol)
    texts, images = retrieval.text_to_image, retrieval.image_to_text
    metrics: Metrics = {"protocol": protocol.value}
    for k in KS:
        text_to_image, image_to_text = texts.ranks.recall(k), images.ranks.recall(k)
        metrics[f"recall_at_{k}"] = (text_to_image + image_to_text) / 2
        metrics[f"recall_at_{k}_text_to_image"] = text_to_image
        metrics[f"recall_at_{k}_image_to_text"] = image_to_text
    metrics["recall_at_10_low"], metrics["recall_at_10_high"] = bootstrap_interval(retrieval.hits(10))
    for name, direction in (("text_to_image", texts), ("image_to_text", images)):
        metrics[f"median_rank_{name}"] = direction.ranks.median_rank()
        metrics[f"mean_rank_{name}"] = direction.ranks.mean_rank()
    metrics |= {
        "num_pairs": int(pool.is_query_N.sum()),
        "num_products": len(torch.unique(pool.products_N[pool.is_query_N])),
        "num_text_queries": int(texts.ranks.counted.sum()),
        "num_image_queries": int(images.ranks.counted.sum()),
        "num_gallery_images": texts.gallery_size,
        "num_gallery_texts": images.gallery_size,
        "similarity_spread": similarity_spread(pool.images_ND, pool.captions_VD),
    }
    return metrics, retrieval


def relative_gain(recall: float, base: float) -> float | None:
    """None over a base of 0."""
    return (recall - base) / base if base > 0 else None


def similarity_spread(images_ND: Tensor, texts_MD: Tensor) -> float:
    """Largest minus smallest cosine similarity among (a sample of) photos and captions; 0: the embeddings have collapsed."""
    image_stride, text_stride = (-(-len(each) // _SPREAD_SAMPLE) for each in (images_ND, texts_MD))
    similarities = images_ND[::image_stride] @ texts_MD[::text_stride].T
    return float(similarities.max() - similarities.min())


def gain(recall: float, base: float) -> str:
    """Absolute and relative."""
    relative = relative_gain(recall, base)
    return f"gain {recall - base:+.4f}" + ("" if relative is None else f" ({relative:+.1%})")


def counted_as(metrics: Mapping[str, Any]) -> str:
    """Protocol and sizes of the galleries: what a recall means nothing without."""
    return f"{metrics['protocol']} among {metrics['num_gallery_images']:,} photos, {metrics['num_gallery_texts']:,} texts"


def embed(
    loaded: LoadedModel,
    photos: EvaluationSet,
    *,
    all_captions: bool,
    batch_size: int,
    plan: PrecisionPlan,
    max_bad_share: float,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[Pool, tuple[BadSample, ...]]:
    """The embeddings of all photos that can be read and of their first captions, or of all captions, each encoded once."""
    network = loaded.network
    was_training = network.training
    network.eval()
    bad = BadSamples(photos.reader.index, max_bad_share)
    captions = photos.captions if all_captions else photos.captions[: photos.num_first_captions]
    try:
        images_ND, readable_N = _encode_images(network, photos, batch_size, plan, bad, on_progress)
        captions_VD = _encode_captions(loaded, captions, batch_size, plan)
    finally:
        network.train(was_training)
        photos.reader.close()  # opened again when next needed; the set itself is kept
    pool = Pool(
        images_ND=images_ND,
        captions_VD=captions_VD,
        caption_rows_NK=photos.caption_rows_NK[readable_N, : None if all_captions else 1],
        products_N=photos.products_N[readable_N],
        categories_N=photos.categories_N[readable_N],
        is_query_N=readable_N < photos.num_query_photos,
    )
    return pool, tuple(bad.found.values())


@torch.no_grad()
def _encode_images(
    network: nn.Module,
    photos: EvaluationSet,
    batch_size: int,
    plan: PrecisionPlan,
    bad: BadSamples,
    on_progress: OnProgress,
) -> tuple[Tensor, Tensor]:
    embeddings, readable = [], list[int]()
    with closing(pixel_blocks(photos, batch_size)) as blocks:
        for start, (pixels_BCHW, good, unreadable) in blocks:
            bad.add(tuple(photos.reader.bad(start + slot, reason) for slot, reason in unreadable))
            images_BCHW = photos.preprocessing.normalise(pixels_BCHW.to(plan.device).float() / 255)
            with plan.autocast():
                block_BD = network.encode_image(images_BCHW, normalize=True)  # type: ignore[operator]
            embeddings.append(block_BD.float()[good])
            readable += [start + slot for slot in good]
            on_progress(min(start + batch_size, len(photos)), len(photos))
    return torch.cat(embeddings), torch.tensor(readable)


@torch.no_grad()
def _encode_captions(loaded: LoadedModel, captions: tuple[str, ...], batch_size: int, plan: PrecisionPlan) -> Tensor:
    tokens_ML = loaded.tokenizer(captions)
    blocks = []
    for tokens_BL in tokens_ML.split(batch_size):
        num_real = len(tokens_BL)
        padded_BL = torch.cat([tokens_BL, tokens_BL[:1].expand(batch_size - num_real, -1)])
        with plan.autocast():
            block_BD = loaded.network.encode_text(padded_BL.to(plan.device), normalize=True)  # type: ignore[operator]
        blocks.append(block_BD.float()[:num_real])
    return torch.cat(blocks)


def cached_zero_shot(
    loaded: LoadedModel,
    photos: EvaluationSet,
    *,
    protocol: Protocol = Protocol.INSTANCE,
    batch_size: int,
    plan: PrecisionPlan,
    max_bad_share: float,
) -> Evaluation:
    """``evaluate`` of untouched weights, computed once on this machine.

    Once for each (weights, preprocessing, data, protocol, arithmetic); trials that ask at the same time wait for the first.
    """
    arithmetic = [batch_size, str(plan), torch.get_num_threads(), max_bad_share]
    identity: list[Any] = [
        _FORMAT,
        loaded.name,
        loaded.weights_fingerprint,
        str(loaded.preprocessing),
        photos.fingerprint,
        protocol.value,
        arithmetic,
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = cache_dir() / "zero_shot" / f"{digest}.json"
    ranks_path = path.with_suffix(".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            cached = json.loads(path.read_text())
            bad = tuple(BadSample(*sample) for sample in cached["bad_samples"])
            return Evaluation(cached["metrics"], load_retrieval(ranks_path)[0], bad, cached["answers"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            evaluation = evaluate(
                loaded, photos, protocol=protocol, batch_size=batch_size, plan=plan, max_bad_share=max_bad_share
            )
        save_retrieval(ranks_path, evaluation.retrieval)
        kept = {"metrics": evaluation.metrics, "bad_samples": evaluation.bad_samples, "answers": evaluation.answers}
        write_json(path, kept)
    return evaluation
