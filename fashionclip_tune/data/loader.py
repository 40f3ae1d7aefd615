"""Batches in the order of their steps, read by other processes, and what happens when one of those is stuck or dies."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.batches import TrainBatch, TrainBatches
from fashionclip_tune.data.index import ShardIndex
from fashionclip_tune.data.preprocessing import Preprocessing, Tokenizer
from fashionclip_tune.errors import LoaderError
from fashionclip_tune.machine.child_processes import end_with_parent

_LOOK_S = 5.0  # between looks at loader processes while a batch is waited for


@contextmanager
def train_loader(
    config: ProjectConfig,
    index: ShardIndex,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    *,
    first_step: int,
    total_steps: int,
    pin_memory: bool,
) -> Iterator[Iterator[TrainBatch]]:
    """Batches of steps ``first_step`` to ``total_steps`` - 1; workers and files are closed at the end of the block."""
    batches = TrainBatches(config, index, preprocessing, tokenizer)
    num_workers = config.training.num_workers
    # Workers are forked from a server that has imported this module, instead of importing torch each for itself.
    multiprocessing.set_forkserver_preload(["fashionclip_tune.data.fork_server"])
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, total_steps),
        num_workers=num_workers,
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        timeout=min(_LOOK_S, config.reading.stall_s) if num_workers else 0,
    )
    iterator = iter(loader)
    try:
        yield _watched(iterator, index, batches.at_work_W2, config.reading.stall_s) if num_workers else iterator
    except LoaderError:
        _kill(iterator)  # torch would wait ten seconds for each that is stuck
        raise
    finally:
        if num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # else they live until the collector runs
            _kill(iterator)  # torch sends SIGTERM, which a run's loader processes never see, and Python waits for them
        batches.close()


def _start_worker(number: int) -> None:
    end_with_parent()


def _kill(iterator: Any) -> None:
    for worker in iterator._workers:
        worker.kill()


def _watched(iterator: Iterator[TrainBatch], index: ShardIndex, at_work_W2: Tensor, stall_s: float) -> Iterator[TrainBatch]:
    """The same batches.

    Raises:
        LoaderError: a worker has died, or has been at one photo for ``stall_s`` seconds while the next batch is waited for.
    """
    before_W2, since = at_work_W2.clone(), time.monotonic()
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError) as error:  # a worker died with a batch half handed over
            raise LoaderError(f"a loader process is gone ({error}): {_doing(index, at_work_W2)}") from error
        except RuntimeError as error:
            if type(error) is not RuntimeError or not str(error).startswith("DataLoader "):
                raise  # out of a worker
            now_W2 = at_work_W2.clone()
            if "timed out" not in str(error):
                raise LoaderError(f"a loader process is gone ({error}): {_doing(index, now_W2)}") from error
            still_W = (now_W2 == before_W2).all(dim=1)
            stuck_W2 = torch.where((still_W & (now_W2[:, 0] >= 0))[:, None], now_W2, -1)
            if not still_W.all() and (stuck_W2 < 0).all():
                before_W2, since = now_W2, time.monotonic()
            elif time.monotonic() - since >= stall_s:
                raise LoaderError(f"no headway for {stall_s:g} s: {_doing(index, stuck_W2)}") from error
            continue
        before_W2, since = at_work_W2.clone(), time.monotonic()
        yield batch


def _doing(index: ShardIndex, at_work_W2: Tensor) -> str:
    texts = []
    for worker, (sample, _) in enumerate(at_work_W2.tolist()):
        if sample >= 0:
            shard = index.shards[int(index.shard_of[sample])]
            texts.append(f"loader process {worker} is at {shard}: {index.keys[sample]}")
    return "; ".join(texts) or "no loader process has begun a photo"
