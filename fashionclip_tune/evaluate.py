"""Retrieval metrics of a model on shards: every photo counts, and only the weights change a figure.

Photos and distinct captions are encoded in blocks of one fixed size, the last one padded, because embeddings at different
batch sizes differ in the last bits, enough to break ties.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fashionclip_tune.cache import cache_dir
from fashionclip_tune.data import BadSamples, cached_index
from fashionclip_tune.files import write_json
from fashionclip_tune.index import BadSample
from fashionclip_tune.metrics import RetrievalRecall, retrieval_recall
from fashionclip_tune.model import LoadedModel, Preprocessing
from fashionclip_tune.precision import PrecisionPlan
from fashionclip_tune.reader import ShardReader, decode_pil
from fashionclip_tune.shards import Shard
from fashionclip_tune.storage import ShardStorage

_KS = (1, 5, 10)
# A validation set whose pixels fit is decoded once a process; a larger one is read again at each evaluation.
_KEPT_PIXELS_BYTES = 1 << 28


class PixelBlock(NamedTuple):
    """Photos of one block: uint8, zeros behind the last one; the slots that hold one; what could not be read."""

    pixels_BCHW: Tensor
    good: list[int]
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """Photos with their first captions; row i of ``caption_of`` is the distinct caption of photo i."""

    reader: ShardReader
    captions: tuple[str, ...]
    caption_of: Tensor
    preprocessing: Preprocessing
    kept_blocks: dict[int, "PixelBlock"] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return self.reader.index.fingerprint


@lru_cache(maxsize=4)
def evaluation_set(
    shards: tuple[Shard, ...], preprocessing: Preprocessing, storage: ShardStorage | None = None
) -> EvaluationSet:
    """Reads the captions; photos are read when they are encoded."""
    reader = ShardReader(cached_index(shards, storage), storage)
    first_captions = [reader.captions(sample)[0] for sample in range(len(reader.index))]
    number_of = {caption: number for number, caption in enumerate(dict.fromkeys(first_captions))}
    caption_of = torch.tensor([number_of[caption] for caption in first_captions])
    return EvaluationSet(reader, tuple(number_of), caption_of, preprocessing)


def evaluate(
    loaded: LoadedModel, photos: EvaluationSet, *, batch_size: int, plan: PrecisionPlan, max_bad_share: float
) -> dict[str, float]:
    """Recall at instance level (photo i's caption is right for photo i only): the published protocol.

    Returns:
        ``recall_at_K`` (mean of both directions), ``recall_at_K_text_to_image`` and ``recall_at_K_image_to_text`` for K
        in 1, 5, 10, and ``num_pairs``.
    """
    network = loaded.network
    was_training = network.training
    network.eval()
    try:
        images_ND, readable_N = _encode_images(network, photos, batch_size, plan, max_bad_share)
        texts_MD = _encode_captions(loaded, photos, batch_size, plan)
    finally:
        network.train(was_training)
        photos.reader.close()  # opened again when next needed; the set itself is kept
    texts_ND = texts_MD[photos.caption_of[readable_N].to(texts_MD.device)]
    instance_N = torch.arange(len(images_ND), device=images_ND.device)
    return _metrics(retrieval_recall(images_ND, texts_ND, instance_N, instance_N, ks=_KS), len(images_ND))


def _metrics(recall: RetrievalRecall, num_pairs: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for k in _KS:
        metrics[f"recall_at_{k}"] = recall.mean[k]
        metrics[f"recall_at_{k}_text_to_image"] = recall.text_to_image[k]
        metrics[f"recall_at_{k}_image_to_text"] = recall.image_to_text[k]
    return {**metrics, "num_pairs": num_pairs}


@torch.no_grad()
def _encode_images(
    network: nn.Module, photos: EvaluationSet, batch_size: int, plan: PrecisionPlan, max_bad_share: float
) -> tuple[Tensor, Tensor]:
    embeddings, readable = [], []
    bad = BadSamples(photos.reader.index, max_bad_share)
    for start in range(0, len(photos.caption_of), batch_size):
        pixels_BCHW, good, found = _block(photos, start, batch_size)
        bad.add(found)
        images_BCHW = photos.preprocessing.normalise(pixels_BCHW.to(plan.device).float() / 255)
        with plan.autocast():
            block_BD = network.encode_image(images_BCHW, normalize=True)  # type: ignore[operator]
        embeddings.append(block_BD.float()[good])
        readable += [start + slot for slot in good]
    return torch.cat(embeddings), torch.tensor(readable)


def _block(photos: EvaluationSet, start: int, batch_size: int) -> PixelBlock:
    if start in photos.kept_blocks and len(photos.kept_blocks[start].pixels_BCHW) == batch_size:
        return photos.kept_blocks[start]
    reader, side = photos.reader, photos.preprocessing.size
    pixels_BCHW = torch.zeros(batch_size, 3, side, side, dtype=torch.uint8)
    good, bad = [], []
    for slot, sample in enumerate(range(start, min(start + batch_size, len(reader.index)))):
        try:
            pixels_BCHW[slot] = photos.preprocessing.resize(decode_pil(reader.image(sample)))
            good.append(slot)
        except (ValueError, OSError) as error:
            bad.append(reader.bad(sample, str(error)))
    block = PixelBlock(pixels_BCHW, good, tuple(bad))
    if len(reader.index) * 3 * side * side <= _KEPT_PIXELS_BYTES:
        photos.kept_blocks[start] = block
    return block


@torch.no_grad()
def _encode_captions(loaded: LoadedModel, photos: EvaluationSet, batch_size: int, plan: PrecisionPlan) -> Tensor:
    tokens_ML = loaded.tokenizer(photos.captions)
    blocks = []
    for tokens_BL in tokens_ML.split(batch_size):
        num_real = len(tokens_BL)
        padded_BL = torch.cat([tokens_BL, tokens_BL[:1].expand(batch_size - num_real, -1)])
        with plan.autocast():
            block_BD = loaded.network.encode_text(padded_BL.to(plan.device), normalize=True)  # type: ignore[operator]
        blocks.append(block_BD.float()[:num_real])
    return torch.cat(blocks)


def cached_zero_shot(
    loaded: LoadedModel, photos: EvaluationSet, *, batch_size: int, plan: PrecisionPlan, max_bad_share: float
) -> dict[str, float]:
    """``evaluate`` of untouched weights, computed once for (weights, preprocessing, data, arithmetic) on this machine."""
    arithmetic = [batch_size, str(plan), torch.get_num_threads(), max_bad_share]
    identity: list[Any] = [
        loaded.name,
        loaded.weights_fingerprint,
        str(loaded.preprocessing),
        photos.fingerprint,
        arithmetic,
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = cache_dir() / "zero_shot" / f"{digest}.json"
    try:
        cached: dict[str, float] = json.loads(path.read_text())
        return cached
    except (OSError, ValueError):
        metrics = evaluate(loaded, photos, batch_size=batch_size, plan=plan, max_bad_share=max_bad_share)
    write_json(path, metrics)
    return metrics
