"""Which samples make up batch k: a pure function of the data, the seed and k.

Batches run across epoch borders, so all have the full size, and every sample comes exactly once an epoch.
"""

from collections.abc import Iterator
from itertools import chain, count

import numpy as np
import numpy.typing as npt

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.index import ShardIndex
from fashionclip_tune.errors import UserError
from fashionclip_tune.seeds import Stream, numpy_generator

Positions = npt.NDArray[np.int64]


def epoch_order(shard_sizes: Positions, *, seed: int, epoch: int, shuffle_shards: bool, shuffle_buffer: int) -> Positions:
    """The samples of one epoch, each exactly once, as positions in the concatenation of the shards.

    Shards in random order (or as they are), cut into windows of ``shuffle_buffer`` samples that are permuted (0: not).
    Reads stay within a window, so a spinning or mounted disk is read nearly in sequence.
    """
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = np.arange(len(shard_sizes))
    if shuffle_shards:
        numpy_generator(seed, Stream.SHARD_ORDER, epoch).shuffle(shards)
    order = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
    if shuffle_buffer:
        generator = numpy_generator(seed, Stream.SAMPLE_ORDER, epoch)
        for start in range(0, len(order), shuffle_buffer):
            generator.shuffle(order[start : start + shuffle_buffer])
    return order.astype(np.int64)


def unique_product_batches(epochs: Iterator[Positions], products: Positions, batch_size: int) -> Iterator[Positions]:
    """The same samples in batches that never hold two photos of one product.

    A photo whose product is in the batch already waits for the next one, before those that have not been drawn yet; at
    the end of an epoch those that wait come first in the next. None is dropped.
    """
    upcoming = (int(sample) for epoch in epochs for sample in epoch)
    waiting: list[int] = []
    while True:
        batch: list[int] = []
        taken: set[int] = set()
        again: list[int] = []
        first = iter(waiting)
        candidates = chain(first, upcoming)
        while len(batch) < batch_size:
            sample = next(candidates)
            if products[sample] in taken:
                again.append(sample)
            else:
                batch.append(sample)
                taken.add(int(products[sample]))
        waiting = [*again, *first]
        yield np.array(batch, dtype=np.int64)


class SampleOrder:
    """Batches of one run by number. Any may be asked for; in rising order it is cheap."""

    def __init__(self, config: ProjectConfig, index: ShardIndex) -> None:
        self._config = config
        self._index = index
        self._batch_size = config.training.batch_size
        self._epochs: dict[int, Positions] = {}  # the two that were used last
        self._next_unique = 0
        self._unique: Iterator[Positions] | None = None
        distinct, self.products = np.unique(index.product_ids, return_inverse=True)  # [samples] equal for one product
        if config.training.unique_products and len(distinct) < self._batch_size:
            raise UserError(
                f"training.unique_products = True is not possible: batches of {self._batch_size} need as many products, "
                f"the training set has {len(distinct)}"
            )

    def batch(self, step: int) -> Positions:
        """[batch_size] positions in the index."""
        if self._config.training.unique_products:
            return self._unique_batch(step)
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, within = np.divmod(positions, len(self._index))
        return np.concatenate([self._epoch(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)])

    def replacement(self, samples: Positions, slot: int, draws: np.random.Generator) -> int:
        """Another sample for a slot of a batch, of no other slot's product where products are to be unique."""
        if not self._config.training.unique_products:
            return int(draws.integers(len(self._index)))
        others = np.delete(self.products[samples], slot)
        allowed = np.flatnonzero(~np.isin(self.products, others))
        return int(draws.choice(allowed))

    def upcoming_shards(self, step: int, *, num_windows: int) -> list[int]:
        """Shards in the order of their first use by ``step`` and what follows, up to the end of that many windows."""
        window = self._config.training.shuffle_buffer or self._index.shard_sizes.max()
        position = step * self._batch_size
        epoch, within = divmod(position, len(self._index))
        ahead = self._epoch(epoch)[within : (within // window + num_windows) * window]
        if num_windows > 1 and len(ahead) < window:  # the next epoch is near
            ahead = np.concatenate([ahead, self._epoch(epoch + 1)[:window]])
        shards = self._index.shard_of[ahead]
        distinct, first = np.unique(shards, return_index=True)
        return [int(shard) for shard in distinct[np.argsort(first)]]

    def _unique_batch(self, step: int) -> Positions:
        # What waits depends on all batches before: going back, or a resumed run, walks from the start (about a
        # microsecond a sample, without reading any).
        if self._unique is None or step < self._next_unique:
            epochs = (self._epoch(epoch) for epoch in count())
            self._unique, self._next_unique = unique_product_batches(epochs, self.products, self._batch_size), 0
        while True:
            batch = next(self._unique)
            self._next_unique += 1
            if self._next_unique > step:
                return batch

    def _epoch(self, epoch: int) -> Positions:
        if epoch not in self._epochs:
            self._epochs = {number: order for number, order in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = epoch_order(
                self._index.shard_sizes,
                seed=self._config.training.seed,
                epoch=epoch,
                shuffle_shards=self._config.shardshuffle,
                shuffle_buffer=self._config.training.shuffle_buffer,
            )
        return self._epochs[epoch]
