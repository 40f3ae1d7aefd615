"""Vectors of photos, kept in a folder: each photo is embedded once, and again only when it or the model has changed.

``vectors.npy`` is float16 [N, D], normalised. ``photos.parquet`` has a row a vector: ``id``, ``path``, ``checksum`` (xxh64 of
the photo's bytes), ``seen`` and the photo's attributes; its metadata say which model made them.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from fashionclip_tune.data.reader import decode_pil
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.dataset import decoded_blocks
from fashionclip_tune.files import atomic_write
from fashionclip_tune.models.batch_norms import evaluating
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.progress import OnProgress, no_progress
from fashionclip_tune.retrieval.photos import Photo, PhotoSource

VECTORS_NAME, PHOTOS_NAME = "vectors.npy", "photos.parquet"
_METADATA = b"fashionclip_tune"
_OWN = ("id", "path", "checksum", "seen")
_SAVED_EVERY_S = 300
_HASHED_AT_A_TIME = 1 << 24
_COPIED_AT_A_TIME = 1 << 16  # rows


@dataclass(frozen=True)
class PhotoVectors:
    vectors_ND: npt.NDArray[np.float16]
    """Mapped from the file."""
    rows: pa.Table
    """``id``, ``path``, ``checksum``, ``seen``, and a column an attribute; empty text where a photo lacks it."""

    def __len__(self) -> int:
        return len(self.vectors_ND)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(name for name in self.rows.column_names if name not in _OWN)


class Embedded(NamedTuple):
    found: PhotoVectors
    num_new: int
    unreadable: tuple[tuple[str, str], ...]
    """Photos that are not among them, by their id, and why."""


def photo_vectors(
    loaded: LoadedModel,
    source: PhotoSource,
    folder: Path,
    *,
    batch_size: int,
    plan: PrecisionPlan,
    on_progress: OnProgress = no_progress,
) -> Embedded:
    """The vectors of a source's photos in its order: those that the folder has, and new ones, which are kept in it.

    What is new is written every five minutes, so that a killed process loses no more.

    Args:
        loaded: its network is on the plan's device.

    Raises:
        UserError: the folder has another model's vectors, or cannot be written.
    """
    model = f"{loaded.weights_fingerprint}:{loaded.preprocessing}"
    kept = _read(folder, model)
    seen = set(kept.rows["seen"].to_pylist()) if kept else set()
    new = [photo for photo in source.photos if photo.seen not in seen]
    attributes: dict[str, dict[str, str]] | None = None
    rows, vectors, unreadable = list[dict[str, str]](), list[npt.NDArray[np.float16]](), list[tuple[str, str]]()
    num_new, due = 0, time.monotonic() + _SAVED_EVERY_S
    for photo, vector_D, checksum in _embedded(loaded, new, batch_size, plan, unreadable, on_progress):
        attributes = source.attributes() if attributes is None else attributes
        own = {"id": photo.id, "path": photo.path, "checksum": checksum, "seen": photo.seen}
        rows.append({**attributes.get(photo.seen, {}), **own})
        vectors.append(vector_D)
        if time.monotonic() > due:
            kept = _extended(folder, model, source, kept, rows, vectors)
            num_new, due = num_new + len(rows), time.monotonic() + _SAVED_EVERY_S
            rows.clear()
            vectors.clear()
    if kept is None and not vectors:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in unreadable))
        raise UserError(f"none of the {len(source.photos):,} photos of {source.name} can be read: {reasons[:300]}")
    if kept is None or rows or len(kept) != len(source.photos) - len(unreadable):  # else all is as it is kept
        kept = _extended(folder, model, source, kept, rows, vectors)
    return Embedded(kept, num_new + len(rows), tuple(unreadable))


@torch.no_grad()
def _embedded(
    loaded: LoadedModel,
    photos: Sequence[Photo],
    batch_size: int,
    plan: PrecisionPlan,
    unreadable: list[tuple[str, str]],
    on_progress: OnProgress,
) -> Iterator[tuple[Photo, npt.NDArray[np.float16], str]]:
    checksums: dict[int, str] = {}

    def fill(number: int, pixels_CHW: Tensor) -> None:
        encoded = photos[number].read()
        checksums[number] = xxhash.xxh64_hexdigest(encoded)
        pixels_CHW[:] = loaded.preprocessing.resize(decode_pil(encoded))

    network, size = loaded.network, loaded.preprocessing.size
    with evaluating(network):
        blocks = decoded_blocks(len(photos), size, batch_size, fill, pin_memory=plan.device.type == "cuda")
        for start, (pixels_BCHW, good, bad) in blocks:
            unreadable += [(photos[start + slot].id, reason) for slot, reason in bad]
            images_BCHW = pixels_BCHW.to(plan.device, non_blocking=True).float().div_(255)
            with plan.autocast():
                block_BD = network.encode_image(loaded.preprocessing.normalise(images_BCHW), normalize=True)  # type: ignore[operator]
            vectors_BD = block_BD.half().cpu().numpy()
            for slot in good:
                yield photos[start + slot], vectors_BD[slot], checksums.pop(start + slot)
            on_progress(min(start + batch_size, len(photos)), len(photos))


def _extended(
    folder: Path,
    model: str,
    source: PhotoSource,
    kept: PhotoVectors | None,
    new_rows: Sequence[Mapping[str, str]],
    new_vectors: Sequence[npt.NDArray[np.float16]],
) -> PhotoVectors:
    """Writes what is kept and what is new, in the source's order and without photos that it has no more."""
    names = [*_OWN, *sorted({name for row in new_rows for name in row} - set(_OWN))]
    new = pa.table({name: pa.array([row.get(name, "") for row in new_rows], pa.string()) for name in names})
    rows = pa.concat_tables([kept.rows, new], promote_options="default") if kept else new
    place_of = {seen: place for place, seen in enumerate(rows["seen"].to_pylist())}
    places_N = np.array([place_of[photo.seen] for photo in source.photos if photo.seen in place_of], dtype=np.int64)
    columns = [pc.fill_null(rows[name], "").take(pa.array(places_N)) for name in rows.column_names]
    parts = ([kept.vectors_ND] if kept else []) + ([np.stack(new_vectors)] if new_vectors else [])
    _write(folder, model, pa.table(columns, rows.column_names), parts, places_N)
    written = _read(folder, model)
    if written is None:
        raise UserError(f"vectors that were written to {folder} are not there any more: does another process write there?")
    return written


def _write(
    folder: Path, model: str, rows: pa.Table, parts: Sequence[npt.NDArray[np.float16]], places_N: npt.NDArray[np.int64]
) -> None:
    """``places_N``: of each row's vector in the parts, one after the other."""
    hashed, num_first = xxhash.xxh64(), len(parts[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / VECTORS_NAME, "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (len(places_N), parts[0].shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(places_N), _COPIED_AT_A_TIME):
                places_B = places_N[start : start + _COPIED_AT_A_TIME]
                block_BD = np.empty((len(places_B), parts[0].shape[1]), dtype="<f2")
                is_first_B = places_B < num_first
                block_BD[is_first_B] = parts[0][places_B[is_first_B]]
                if len(parts) > 1:
                    block_BD[~is_first_B] = parts[1][places_B[~is_first_B] - num_first]
                file.write(block_BD.tobytes())
                hashed.update(block_BD.tobytes())
        said = json.dumps({"model": model, "vectors": hashed.hexdigest()}).encode()
        with atomic_write(folder / PHOTOS_NAME, "wb") as file:
            pq.write_table(rows.replace_schema_metadata({_METADATA: said}), file)
    except OSError as error:
        raise UserError(f"vectors cannot be kept in {folder}: {error}") from error


def _read(folder: Path, model: str) -> PhotoVectors | None:
    """None: nothing there, or not both files of one writing, as a killed process leaves them."""
    try:
        rows = pq.read_table(folder / PHOTOS_NAME)
        said = json.loads((rows.schema.metadata or {})[_METADATA])
        vectors_ND = np.load(folder / VECTORS_NAME, mmap_mode="r", allow_pickle=False)
        is_whole = len(vectors_ND) == len(rows) and _hash_of(vectors_ND) == said["vectors"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    if is_whole and said["model"] != model:
        raise UserError(f"{folder} has vectors of another model: name another folder, or remove it")
    return PhotoVectors(vectors_ND, rows) if is_whole else None


def _hash_of(vectors_ND: npt.NDArray[np.float16]) -> str:
    hashed, bytes_of = xxhash.xxh64(), vectors_ND.reshape(-1).view(np.uint8)
    for start in range(0, len(bytes_of), _HASHED_AT_A_TIME):
        hashed.update(bytes_of[start : start + _HASHED_AT_A_TIME].data)
    return hashed.hexdigest()
