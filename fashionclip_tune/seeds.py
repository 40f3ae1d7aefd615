"""Random streams that are pure functions of (seed, what for, where): nothing about randomness needs to be saved."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    CAPTION = 3
    REPLACEMENT = 4
    AUGMENTATION = 5
    MODEL = 6
    CANDIDATES = 7
    PATCHES = 8


def numpy_generator(seed: int, stream: Stream, *where: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, *where])


def torch_seed(seed: int, stream: Stream, *where: int) -> int:
    return int(np.random.SeedSequence([seed, stream, *where]).generate_state(1, np.uint64)[0]) >> 1
