"""Retrieval metrics of a model on shards: every photo counts, and only the weights change a figure."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.data.index import BadSample
from fashionclip_tune.evaluation.dataset import EvaluationSet
from fashionclip_tune.evaluation.encode import EncodingSpeed, embed
from fashionclip_tune.evaluation.examples import fixed_queries, top_photos
from fashionclip_tune.evaluation.protocols import KS, Pool, Retrieval, coverage, load_retrieval, retrieve, save_retrieval
from fashionclip_tune.evaluation.statistics import bootstrap_interval
from fashionclip_tune.files import cache_dir, write_json
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.progress import OnProgress, no_progress

# Of what the zero-shot cache holds: increase it with every change of what a figure means.
_FORMAT = 6
_NUM_SHOWN, _NUM_ANSWERS = 6, 5
_SPREAD_SAMPLE = 1_000

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` of one protocol, flat; the queries' ranks behind them; what could not be read.

    ``answers``: the photos of a few captions, and the five that the model finds first for each: [photo, first, second...].
    ``speed``: None of what was measured before, elsewhere perhaps, and comes from the cache.
    """

    metrics: Metrics
    retrieval: Retrieval
    bad_samples: tuple[BadSample, ...]
    answers: list[list[int]]
    speed: EncodingSpeed | None


def evaluate(
    loaded: LoadedModel,
    photos: EvaluationSet,
    *,
    protocol: RetrievalProtocol = RetrievalProtocol.INSTANCE,
    batch_size: int,
    plan: PrecisionPlan,
    max_bad_share: float,
    on_progress: OnProgress = no_progress,
) -> Evaluation:
    """Encodes photos and captions and ranks them under a protocol; see ``describe`` for the metrics.

    Raises:
        BadDataError: more photos than ``max_bad_share`` cannot be read.
        UserError: the protocol needs what the shards do not have.
    """
    pool, bad, speed = embed(
        loaded,
        photos,
        all_captions=protocol is RetrievalProtocol.ALL_CAPTIONS,
        batch_size=batch_size,
        plan=plan,
        max_bad_share=max_bad_share,
        on_progress=on_progress,
    )
    answers = _answers(pool) if len(pool.products_N) == len(photos) else []  # else numbers do not name photos
    return Evaluation(*describe(pool, protocol), bad, answers, speed)


def _answers(pool: Pool) -> list[list[int]]:
    queries = fixed_queries(int(pool.is_query_N.sum()), _NUM_SHOWN)
    found = top_photos(pool, torch.tensor(queries), _NUM_ANSWERS).tolist()
    return [[query, *photos] for query, photos in zip(queries, found, strict=True)]


def describe(pool: Pool, protocol: RetrievalProtocol) -> tuple[Metrics, Retrieval]:
    """Ranks a pool under a protocol.

    Returns:
        ``protocol``; ``recall_at_K`` (mean of both directions), ``recall_at_K_text_to_image``, ``recall_at_K_image_to_text``
        for K in 1, 5, 10; ``recall_at_10_low`` and ``_high`` (95 % interval over products); ``median_rank_`` and
        ``mean_rank_`` of both directions; ``num_pairs`` (photos searched for), ``num_products`` of theirs,
        ``num_text_queries``, ``num_image_queries`` (over all draws), ``num_gallery_images``, ``num_gallery_texts``;
        ``similarity_spread`` (0: the embeddings have collapsed); of ``candidates_101`` what ``coverage`` says.
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
        **coverage(pool, protocol),
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


def coverage_line(metrics: Mapping[str, Any]) -> str | None:
    """For how many photos ``candidates_101`` was asked, in words; None for protocols that ask for all."""
    if "num_asked_photos" not in metrics:
        return None
    return (
        f"{metrics['protocol']}: could be asked for {metrics['num_asked_photos']:,} of {metrics['num_pairs']:,} photos "
        f"({metrics['num_asked_products']:,} of {metrics['num_products']:,} products, {metrics['num_asked_categories']:,} of "
        f"{metrics['num_categories']:,} categories); the others have too few of other products in their category. Asked in "
        f"{metrics['num_draws']} draws: {metrics['num_text_queries']:,} times"
    )


def cached_zero_shot(
    loaded: LoadedModel,
    photos: EvaluationSet,
    *,
    protocol: RetrievalProtocol = RetrievalProtocol.INSTANCE,
    batch_size: int,
    plan: PrecisionPlan,
    max_bad_share: float,
    on_progress: OnProgress = no_progress,
) -> Evaluation:
    """``evaluate`` of zero-shot weights, computed once on this machine.

    Once for each (network, weights, preprocessing, data, protocol, arithmetic); trials that ask together wait for the first.
    """
    arithmetic = [batch_size, str(plan), torch.get_num_threads(), max_bad_share]
    identity: list[Any] = [
        _FORMAT,
        json.dumps(loaded.model_config, sort_keys=True),  # an activation is in no tensor
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
            return Evaluation(cached["metrics"], load_retrieval(ranks_path)[0], bad, cached["answers"], None)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            evaluation = evaluate(
                loaded,
                photos,
                protocol=protocol,
                batch_size=batch_size,
                plan=plan,
                max_bad_share=max_bad_share,
                on_progress=on_progress,
            )
        save_retrieval(ranks_path, evaluation.retrieval)
        kept = {"metrics": evaluation.metrics, "bad_samples": evaluation.bad_samples, "answers": evaluation.answers}
        write_json(path, kept)
    return evaluation
