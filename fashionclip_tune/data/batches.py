"""Training batches: which photos make up step k, and how they are read.

What step k sees is a pure function of (configuration, seed, k). Workers read, decode, pick the caption and, where a photo
is not of the canvas' shape, resize it as uint8; everything else happens in a batch on the training device.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fashionclip_tune.config.choices import CaptionChoice
from fashionclip_tune.config.options import AugmentationConfig
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import storage_of
from fashionclip_tune.data.index import BadSample, ShardIndex
from fashionclip_tune.data.preprocessing import Preprocessing, Tokenizer
from fashionclip_tune.data.reader import ShardReader, decode_photo
from fashionclip_tune.data.sampling import Positions, SampleOrder
from fashionclip_tune.data.shard_cache import Prefetcher, ShardStorage, copy_first
from fashionclip_tune.errors import BadDataError, UserError
from fashionclip_tune.progress import OnProgress
from fashionclip_tune.seeds import Stream, numpy_generator

_REPLACEMENT_ATTEMPTS = 20
_LOOK_EVERY = 16  # steps between looks at which shards come next
_KEPT_CAPTIONS = 100_000  # 60 MB at 77 tokens


@dataclass(frozen=True)
class TrainBatch:
    """B photos with a caption each."""

    images_BCHW: Tensor  # uint8, canvas size
    tokens_BL: Tensor
    products_B: Tensor  # int64, equal for photos of one product
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...]  # met while this batch was read, and replaced

    def pin_memory(self) -> "TrainBatch":
        return replace(self, images_BCHW=self.images_BCHW.pin_memory(), tokens_BL=self.tokens_BL.pin_memory())


class TrainBatches(Dataset[TrainBatch]):
    """Step number to batch. Batches run across epoch borders, so all have the full size."""

    def __init__(self, config: ProjectConfig, index: ShardIndex, preprocessing: Preprocessing, tokenizer: Tokenizer):
        if len(index) < config.training.batch_size:
            raise UserError(
                f"training.batch_size = {config.training.batch_size} is more than the {len(index)} photos of the training set"
            )
        self._training = config.training
        self._captions = config.augmentation
        storage = storage_of(config)
        self._reader = ShardReader(index, storage, on_wait=self._note)
        self._preprocessing = preprocessing
        self._tokenizer = tokenizer
        self._order = SampleOrder(config, index)
        self._known_tokens: dict[str, Tensor] = {}
        self._canvas = preprocessing.canvas(index.pixel_sizes)
        self._copies: _CopiesAhead | None = None
        if any(map(storage.copies, index.shards)):
            self._copies = _CopiesAhead(index, self._order, storage)
        # Of each worker: the sample that it is at (-1: none), and a count of its headway; the training process sees it.
        self.at_work_W2 = torch.full((max(1, self._training.num_workers), 2), -1).share_memory_()

    def __getitem__(self, step: int) -> TrainBatch:
        samples = self._order.batch(step)
        if self._copies is not None:
            self._copies.look_ahead(step)
        caption_draws = numpy_generator(self._training.seed, Stream.CAPTION, step).random(len(samples))
        # Pixel by pixel as the decoder writes them: to separate the colours is left to the device.
        images_BHWC = torch.empty(len(samples), *self._canvas, 3, dtype=torch.uint8)
        captions, bad = [], list[BadSample]()
        for slot in range(len(samples)):
            image_CHW, choices = self._photo_or_replacement(samples, slot, step, bad)
            images_BHWC[slot] = image_CHW.permute(1, 2, 0)
            captions.append(choices[_chosen_caption(self._captions, float(caption_draws[slot]), len(choices))])
        if self._copies is not None:
            self._reader.release_copies()
        self._note(-1)
        keys = tuple(self._reader.index.keys[samples].tolist())
        images_BCHW, products_B = images_BHWC.permute(0, 3, 1, 2), torch.from_numpy(self._order.products[samples])
        return TrainBatch(images_BCHW, self._tokens(captions), products_B, keys, tuple(bad))

    def _tokens(self, captions: list[str]) -> Tensor:
        """[B, L]; photos of a product share captions, and epochs repeat them, so tokens are kept for the next time."""
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._known_tokens]
        if unknown:
            if len(self._known_tokens) + len(unknown) > _KEPT_CAPTIONS:
                self._known_tokens.clear()
                unknown = list(dict.fromkeys(captions))
            self._known_tokens.update(zip(unknown, self._tokenizer(unknown), strict=True))
        return torch.stack([self._known_tokens[caption] for caption in captions])

    def _photo_or_replacement(self, samples: Positions, slot: int, step: int, bad: list[BadSample]) -> tuple[Tensor, list[str]]:
        """A slot's photo on its canvas and its captions.

        If it cannot be read, another sample, drawn as a function of (step, slot), takes its place in ``samples``.
        """
        draws: np.random.Generator | None = None
        for _ in range(_REPLACEMENT_ATTEMPTS):
            sample = int(samples[slot])
            self._note(sample)
            try:
                photo = decode_photo(self._reader.image(sample))
                return self._preprocessing.resize_to_canvas(photo, self._canvas), self._reader.captions(sample)
            except (ValueError, OSError) as error:
                bad.append(self._reader.bad(sample, str(error)))
            draws = draws or numpy_generator(self._training.seed, Stream.REPLACEMENT, step, slot)
            samples[slot] = self._order.replacement(samples, slot, draws)
        raise BadDataError(f"{_REPLACEMENT_ATTEMPTS} photos in a row cannot be read, such as {bad[-1]}")

    def _note(self, sample: int | None = None) -> None:
        """Headway: a sample is begun, none is (-1), or what the current one waits for has come nearer."""
        worker = get_worker_info()
        mine = self.at_work_W2.numpy()[worker.id if worker else 0]
        mine[0] = sample if sample is not None else mine[0]
        mine[1] += 1

    def close(self) -> None:
        self._reader.close()
        if self._copies is not None:
            self._copies.ahead.close()


def copy_first_shards(
    config: ProjectConfig, index: ShardIndex, valid: ShardIndex, on_progress: OnProgress, *, step: int = 0
) -> None:
    """Copies, where shards are copied at all, what a run would wait for: all to evaluate on, and the window of ``step``."""
    storage = storage_of(config)
    if not any(map(storage.copies, (*index.shards, *valid.shards))):
        return
    window = SampleOrder(config, index).upcoming_shards(step, num_windows=1)
    to_train_on = [(index.shards[number], index.contents[number]) for number in window]
    copy_first(storage, [*zip(valid.shards, valid.contents, strict=True), *to_train_on], on_progress)


class _CopiesAhead:
    """Has the shards of the next steps copied before they are read, as far as they fit."""

    def __init__(self, index: ShardIndex, order: SampleOrder, storage: ShardStorage) -> None:
        self._index = index
        self._order = order
        self._max_bytes = storage.max_bytes
        self.ahead = Prefetcher(storage)
        self._next_look = 0
        shards = order.upcoming_shards(0, num_windows=1)
        needed = sum(index.contents[shard].num_bytes for shard in shards)
        if needed > self._max_bytes:
            raise UserError(
                f"reading.scratch_gb = {self._max_bytes / 1e9:g} is too little: training.shuffle_buffer draws from "
                f"{len(shards)} shards at a time, {needed / 1e9:.3g} GB; allow more, or lower shuffle_buffer"
            )

    def look_ahead(self, step: int) -> None:
        if 0 <= self._next_look - step <= _LOOK_EVERY:
            return
        self._next_look = step + _LOOK_EVERY
        wanted, total = [], 0
        for shard in self._order.upcoming_shards(step, num_windows=2):
            total += self._index.contents[shard].num_bytes
            if total > self._max_bytes:
                break
            wanted.append((self._index.shards[shard], self._index.contents[shard]))
        self.ahead.want(wanted)


def _chosen_caption(captions: AugmentationConfig, draw: float, count: int) -> int:
    """Which of ``count`` captions a draw from [0, 1) means; the original one is number 0."""
    if captions.caption is CaptionChoice.ORIGINAL or count == 1:
        return 0
    if captions.caption is CaptionChoice.UNIFORM:
        return int(draw * count)
    original = captions.original_caption_probability
    return 0 if draw < original else 1 + int((draw - original) / (1 - original) * (count - 1))
