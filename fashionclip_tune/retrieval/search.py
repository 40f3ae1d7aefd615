"""A search from a model's name and a folder of photos to the nearest of them."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.reader import decode_pil
from fashionclip_tune.errors import UserError
from fashionclip_tune.files import cache_dir
from fashionclip_tune.models.named_model import named_model
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import plan_precision
from fashionclip_tune.progress import OnProgress, no_progress
from fashionclip_tune.retrieval.nearest import nearest, photo_vector, text_vectors
from fashionclip_tune.retrieval.page import Search
from fashionclip_tune.retrieval.photo_vectors import photo_vectors
from fashionclip_tune.retrieval.photos import PhotoSource, photo_source

_log = logging.getLogger(__name__)
_NAMED = 3


class SearchResult(NamedTuple):
    searches: list[Search]
    about: str
    folder: Path
    """Of the vectors."""
    read: Callable[[dict[str, str]], bytes]
    """A photo's bytes by its row."""


def search(
    model: str,
    images: str,
    *,
    words: Sequence[str] = (),
    photos: Sequence[Path] = (),
    count: int = 10,
    where: Mapping[str, str] | None = None,
    folder: Path | None = None,
    config: ProjectConfig | None = None,
    on_progress: OnProgress = no_progress,
) -> SearchResult:
    """The photos nearest to each of the words, and to each of the photos; embeds those of ``images`` that are new.

    Args:
        model: as ``evaluate --model``.
        images: a folder of photos or of shards, or the URL of one.
        folder: where vectors are kept; None: in the cache, by model and photos.
        config: device, precision and how shards are reached.

    Raises:
        UserError: no such model, photos or attribute.
    """
    config = config or ProjectConfig()
    source = photo_source(images, config)
    asked = [(file.name, _read(file)) for file in photos]
    loaded, plan = named_model(model, config).loaded, plan_precision(config)
    loaded.network.to(plan.device)
    folder = (folder or _default_folder(loaded, source)).absolute()
    batch_size = config.evaluation.batch_size
    made = photo_vectors(loaded, source, folder, batch_size=batch_size, plan=plan, on_progress=on_progress)
    if made.unreadable:
        named = "; ".join(f"{name} ({reason})" for name, reason in made.unreadable[:_NAMED])
        more = f" and {len(made.unreadable) - _NAMED:,} more" if len(made.unreadable) > _NAMED else ""
        _log.warning(f"left out, not readable: {named}{more}")
    searches = [
        Search(query, None, nearest(made.found, vector_D, count, where))
        for query, vector_D in zip(words, text_vectors(loaded, words, plan) if words else (), strict=True)
    ]
    for name, encoded in asked:
        try:
            vector_1D = photo_vector(loaded, decode_pil(encoded), plan)
        except ValueError as error:
            raise UserError(f"--image {name}: {error}") from error
        searches.append(Search(name, encoded, nearest(made.found, vector_1D[0], count, where)))
    about = f"{len(made.found):,} photos of {source.name}, {made.num_new:,} of them new, by {model}"
    if where:
        about += f"; searched were those with {', '.join(f'{name} {value}' for name, value in where.items())}"
    of_row = {photo.seen: photo.read for photo in source.photos}
    return SearchResult(searches, about, folder, lambda row: of_row[row["seen"]]())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--image {file} cannot be read: {error.strerror}") from error


def _default_folder(loaded: LoadedModel, source: PhotoSource) -> Path:
    name = hashlib.sha256(f"{loaded.weights_fingerprint}:{loaded.preprocessing}:{source.name}".encode()).hexdigest()[:16]
    return cache_dir() / "vectors" / name
