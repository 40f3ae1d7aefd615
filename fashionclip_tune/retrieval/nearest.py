"""Exact search: the photos whose vectors are nearest to a query's."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from fashionclip_tune.errors import UserError
from fashionclip_tune.models.batch_norms import evaluating
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.models.token_rows import rows_at_hand
from fashionclip_tune.retrieval.photo_vectors import PhotoVectors

_ROWS_AT_A_TIME = 1 << 16  # 128 MB of 512 numbers in float32
_MOST_NAMED = 12


class Answer(NamedTuple):
    score: float
    """Cosine similarity."""
    row: dict[str, str]
    """The photo's, as ``photos.parquet`` has it."""


def text_vectors(loaded: LoadedModel, texts: Sequence[str], plan: PrecisionPlan) -> npt.NDArray[np.float32]:
    """[texts, D], normalised."""
    tokens_QL = loaded.tokenizer(texts)
    with torch.no_grad(), evaluating(loaded.network), rows_at_hand(loaded.network, tokens_QL), plan.autocast():
        return _numbers(loaded.network.encode_text(tokens_QL.to(plan.device), normalize=True))  # type: ignore[operator]


def photo_vector(loaded: LoadedModel, photo: Image.Image, plan: PrecisionPlan) -> npt.NDArray[np.float32]:
    """[1, D], normalised."""
    pixels_1CHW = loaded.preprocessing.resize(photo)[None].to(plan.device).float().div_(255)
    with torch.no_grad(), evaluating(loaded.network), plan.autocast():
        return _numbers(loaded.network.encode_image(loaded.preprocessing.normalise(pixels_1CHW), normalize=True))  # type: ignore[operator]


def _numbers(vectors_QD: Tensor) -> npt.NDArray[np.float32]:
    numbers: npt.NDArray[np.float32] = vectors_QD.float().cpu().numpy()
    return numbers


def nearest(
    photos: PhotoVectors, query_D: npt.NDArray[np.float32], count: int, where: Mapping[str, str] | None = None
) -> list[Answer]:
    """The ``count`` nearest photos, or all of fewer, nearest first; photos that are as near in the order of their rows.

    Args:
        where: attributes and the values that photos must have, letters' case aside.

    Raises:
        UserError: no photo has such an attribute or value.
    """
    allowed_M = _rows_where(photos, where or {})
    best_K, scores_K = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    for start in range(0, len(allowed_M), _ROWS_AT_A_TIME):
        rows_B = allowed_M[start : start + _ROWS_AT_A_TIME]
        scores_B = photos.vectors_ND[rows_B].astype(np.float32) @ query_D
        best_K, scores_K = np.concatenate([best_K, rows_B]), np.concatenate([scores_K, scores_B])
        order_K = np.argsort(-scores_K, kind="stable")[:count]
        best_K, scores_K = best_K[order_K], scores_K[order_K]
    rows = photos.rows.take(best_K).to_pylist()
    return [Answer(float(score), row) for score, row in zip(scores_K, rows, strict=True)]


def _rows_where(photos: PhotoVectors, where: Mapping[str, str]) -> npt.NDArray[np.int64]:
    allowed_N = np.ones(len(photos), dtype=bool)
    for name, value in where.items():
        if name not in photos.attributes:
            there = f"they have {', '.join(photos.attributes)}" if photos.attributes else "they have none"
            raise UserError(f"--where {name}={value}: the photos have no attribute {name}; {there}")
        column = pc.utf8_lower(photos.rows[name])
        has_it_N = pc.equal(column, value.lower()).to_numpy()
        if not has_it_N.any():
            common = pc.value_counts(photos.rows[name]).to_pylist()
            values = sorted((each for each in common if each["values"]), key=lambda each: -each["counts"])[:_MOST_NAMED]
            named = ", ".join(each["values"] for each in values)
            raise UserError(f"--where {name}={value}: no photo has that {name}; the most frequent are {named}")
        allowed_N &= has_it_N
    return np.flatnonzero(allowed_N)
