"""Photos and captions to embeddings, for evaluation, and how fast that is.

Photos and distinct captions are encoded in blocks of one fixed size, the last one padded, because embeddings at different
batch sizes differ in the last bits, enough to break ties.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fashionclip_tune.data.dataset import BadSamples
from fashionclip_tune.data.index import BadSample
from fashionclip_tune.evaluation.dataset import EvaluationSet, pixel_blocks
from fashionclip_tune.evaluation.protocols import Pool
from fashionclip_tune.models.batch_norms import evaluating
from fashionclip_tune.models.openclip import LoadedModel
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.models.token_rows import rows_at_hand
from fashionclip_tune.progress import OnProgress, no_progress


class EncodingSpeed(NamedTuple):
    """Of the towers alone, as a catalogue would be encoded with them: photos are decoded and captions are tokens already."""

    images_encoded_per_second: float
    texts_encoded_per_second: float


class BlockClock:
    """Times blocks of equal work. A GPU's by its own clock, read when all is done, so that no block is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._on_gpu: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def block(self) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - started)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._on_gpu.append((start, end))

    def seconds_a_block(self) -> float:
        """The median, which the first block, slowed by what is set up once, hardly moves."""
        if self._on_gpu:
            self._on_gpu[-1][1].synchronize()
        return float(median([*self._seconds, *(start.elapsed_time(end) / 1000 for start, end in self._on_gpu)]))


def embed(
    loaded: LoadedModel,
    photos: EvaluationSet,
    *,
    all_captions: bool,
    batch_size: int,
    plan: PrecisionPlan,
    max_bad_share: float,
    on_progress: OnProgress = no_progress,
) -> tuple[Pool, tuple[BadSample, ...], EncodingSpeed]:
    """The embeddings of all photos that can be read and of their first captions, or of all captions, each encoded once.

    Raises:
        BadDataError: more photos than ``max_bad_share`` cannot be read.
    """
    network = loaded.network
    bad = BadSamples(photos.reader.index, max_bad_share)
    captions = photos.captions if all_captions else photos.captions[: photos.num_first_captions]
    image_clock, text_clock = BlockClock(plan.device), BlockClock(plan.device)
    try:
        with evaluating(network):
            images_ND, readable_N = _encode_images(network, photos, batch_size, plan, bad, on_progress, image_clock)
            captions_VD = _encode_captions(loaded, captions, batch_size, plan, text_clock)
    finally:
        photos.reader.close()  # opened again when next needed; the set itself is kept
    pool = Pool(
        images_ND=images_ND,
        captions_VD=captions_VD,
        caption_rows_NK=photos.first_rows_N[readable_N, None],
        further_F2=_among(photos.further_F2, readable_N, len(photos)) if all_captions else None,
        products_N=photos.products_N[readable_N],
        categories_N=photos.categories_N[readable_N],
        is_query_N=readable_N < photos.num_query_photos,
    )
    speed = EncodingSpeed(*(batch_size / clock.seconds_a_block() for clock in (image_clock, text_clock)))
    return pool, tuple(bad.found.values()), speed


def _among(further_F2: Tensor, readable_N: Tensor, num_photos: int) -> Tensor:
    """Further captions of the photos that can be read, which have other numbers then."""
    place_of = torch.full((num_photos,), -1)
    place_of[readable_N] = torch.arange(len(readable_N))
    places_F = place_of[further_F2[:, 0]]
    return torch.stack([places_F, further_F2[:, 1]], dim=1)[places_F >= 0]


@torch.no_grad()
def _encode_images(
    network: nn.Module,
    photos: EvaluationSet,
    batch_size: int,
    plan: PrecisionPlan,
    bad: BadSamples,
    on_progress: OnProgress,
    clock: BlockClock,
) -> tuple[Tensor, Tensor]:
    embeddings, readable = [], list[int]()
    # From pinned memory a block is copied while the one before it is encoded, and nothing waits for the device.
    with closing(pixel_blocks(photos, batch_size, pin_memory=plan.device.type == "cuda")) as blocks:
        for start, (pixels_BCHW, good, unreadable) in blocks:
            bad.add(tuple(photos.reader.bad(start + slot, reason) for slot, reason in unreadable))
            images_BCHW = pixels_BCHW.to(plan.device, non_blocking=True).float().div_(255)
            images_BCHW = photos.preprocessing.normalise(images_BCHW)
            with plan.autocast(), clock.block():
                block_BD = network.encode_image(images_BCHW, normalize=True)  # type: ignore[operator]
            embeddings.append(block_BD.float())
            readable += [start + slot for slot in good]
            on_progress(min(start + batch_size, len(photos)), len(photos))
    readable_N = torch.tensor(readable, pin_memory=plan.device.type == "cuda")
    return torch.cat(embeddings)[readable_N.to(plan.device, non_blocking=True)], readable_N


@torch.no_grad()
def _encode_captions(
    loaded: LoadedModel, captions: tuple[str, ...], batch_size: int, plan: PrecisionPlan, clock: BlockClock
) -> Tensor:
    tokens_ML = loaded.tokenizer(captions)
    blocks = []
    with rows_at_hand(loaded.network, tokens_ML):
        for tokens_BL in tokens_ML.split(batch_size):
            num_real = len(tokens_BL)
            padded_BL = torch.cat([tokens_BL, tokens_BL[:1].expand(batch_size - num_real, -1)])
            padded_BL = padded_BL.to(plan.device, non_blocking=True)
            with plan.autocast(), clock.block():
                block_BD = loaded.network.encode_text(padded_BL, normalize=True)  # type: ignore[operator]
            blocks.append(block_BD.float()[:num_real])
    return torch.cat(blocks)
