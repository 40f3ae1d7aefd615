#!/usr/bin/env python
"""Seconds and memory of Recall@5 and @10 both ways: this project's, the published way, torchmetrics, and the limit.

    python -m benchmarks retrieval_recall --rounds 5

Random pairs of 512 dimensions, one relevant item a query. Each method runs in a process of its own, in turn, round after
round, on one thread; seconds are of that process's CPU time, so that other work on the machine counts little.
``matrix_product`` is the bare N x N product in blocks, of which nothing is kept: no exact method can be faster.
``published`` is the published way: the whole matrix, all of its rows and then its columns sorted, for both k (up to 20,000
pairs, 7 GB; 32,528 would need 18 GB). ``argsort_in_blocks`` sorts the same in blocks of 1,024 queries, which is kinder to the
cache. It and torchmetrics are measured on ``--queries`` queries each way and scaled up; their recall is then that of these
queries. torchmetrics is no dependency: give it a folder from
``pip install --no-deps --target DIR torchmetrics lightning-utilities`` and ``--torchmetrics DIR``, or it is left out.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.harness import in_own_process, in_turn, median_ratio, spread

_DIM = 512
_BLOCK = 1024
_WHOLE_UP_TO = 20_000
_KS = (5, 10)
Recalls = tuple[float, float] | None


def pairs(num: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, _DIM, generator=generator)
    texts = 0.12 * images + torch.randn(num, _DIM, generator=generator)
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def ours(images: Tensor, texts: Tensor, num_queries: int) -> Recalls:
    from fashionclip_tune.metrics import retrieval_recall

    pair = torch.arange(len(images))
    recall = retrieval_recall(images, texts, pair, pair, ks=_KS)
    return recall.text_to_image[10], recall.image_to_text[10]


def matrix_product(images: Tensor, texts: Tensor, num_queries: int) -> Recalls:
    block = torch.empty(_BLOCK, _BLOCK)
    for rows in images.split(_BLOCK):
        for columns in texts.split(_BLOCK):
            torch.mm(rows, columns.T, out=block[: len(rows), : len(columns)])
    return None


def published(images: Tensor, texts: Tensor, num_queries: int) -> Recalls:
    """The order of all items for each query, then whether its own is among the first k."""
    similarity = images @ texts.T
    own = torch.arange(len(images))[:, None]
    recalls = []
    for scores in (similarity.T, similarity):
        order = scores.argsort(dim=1, descending=True)
        hits = {k: (order[:, :k] == own).any(dim=1).double().mean().item() for k in _KS}
        recalls.append(hits[10])
        del order
    return recalls[0], recalls[1]


def argsort_in_blocks(images: Tensor, texts: Tensor, num_queries: int) -> Recalls:
    recalls = []
    for queries, items in ((texts, images), (images, texts)):
        hits = dict.fromkeys(_KS, 0)
        for start in range(0, num_queries, _BLOCK):
            own = torch.arange(start, min(start + _BLOCK, num_queries))
            order = (queries[own] @ items.T).argsort(dim=1, descending=True)
            for k in _KS:
                hits[k] += int((order[:, :k] == own[:, None]).any(dim=1).sum())
        recalls.append(hits[10] / num_queries)
    return recalls[0], recalls[1]


def torchmetrics(images: Tensor, texts: Tensor, num_queries: int) -> Recalls:
    """Its hit rate, query by query, as its RetrievalHitRate does once it has grouped N x N scores."""
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    recalls = []
    for queries, items in ((texts, images), (images, texts)):
        hits = dict.fromkeys(_KS, 0.0)
        for start in range(0, num_queries, _BLOCK):
            numbers = range(start, min(start + _BLOCK, num_queries))
            for number, scores in zip(numbers, queries[numbers.start : numbers.stop] @ items.T, strict=True):
                target = torch.zeros(len(items), dtype=torch.bool)
                target[number] = True
                for k in _KS:
                    hits[k] += float(retrieval_hit_rate(scores, target, top_k=k))
        recalls.append(hits[10] / num_queries)
    return recalls[0], recalls[1]


METHODS: dict[str, Callable[[Tensor, Tensor, int], Recalls]] = {
    "ours": ours,
    "matrix_product": matrix_product,
    "published": published,
    "argsort_in_blocks": argsort_in_blocks,
    "torchmetrics": torchmetrics,
}


def measure(name: str, num: int, num_queries: int) -> dict[str, object]:
    torch.set_num_threads(1)
    images, texts = pairs(num)
    METHODS[name](images[:2048], texts[:2048], 64)  # imports, thread pools
    before = _peak_megabytes()
    started = time.process_time()
    recalls = METHODS[name](images, texts, num_queries)
    seconds = time.process_time() - started
    return {"seconds": seconds, "recalls": recalls, "peak_mb": _peak_megabytes(), "before_mb": before}


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[6_912, 20_000, 32_528], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--queries", type=int, default=1_024, help="of argsort_in_blocks and torchmetrics, each way (default: %(default)s)"
    )
    parser.add_argument("--torchmetrics", metavar="DIR", help="folder with torchmetrics and lightning-utilities")
    parser.add_argument("--only", nargs=2, metavar=("METHOD", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, size = arguments.only[0], int(arguments.only[1])
        print(json.dumps(measure(name, size, min(arguments.queries, size))))
        return
    names = [name for name in METHODS if name != "torchmetrics" or arguments.torchmetrics]
    print(f"{_DIM} dimensions, one thread, {arguments.rounds} rounds; {platform.machine()}, torch {torch.__version__}")
    print("| pairs | method | seconds, median | lowest | highest | over ours, median of the rounds | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        _compare([name for name in names if name != "published" or size <= _WHOLE_UP_TO], size, arguments)


def _compare(names: list[str], size: int, arguments: argparse.Namespace) -> None:
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), arguments.torchmetrics)))}
    flags = (size, "--queries", arguments.queries)
    found = in_turn(names, arguments.rounds, lambda name: in_own_process(__file__, "--only", name, *flags, environment=path))
    last = {name: measured[-1] for name, measured in found.items()}
    seconds: dict[str, list[float]] = {}
    for name in names:
        scale = size / min(arguments.queries, size) if name in ("argsort_in_blocks", "torchmetrics") else 1
        seconds[name] = [each["seconds"] * scale for each in found[name]]
    for name in names:
        figures, ratio = spread(seconds[name], ",.2f"), median_ratio(seconds[name], seconds["ours"])
        print(f"| {size:,} | {name} | {figures} | {ratio:.2f} | {last[name]['peak_mb']:,.0f} |", flush=True)
    for name in names:
        if last[name]["recalls"]:
            both = ", ".join(f"{value:.6f}" for value in last[name]["recalls"])
            print(f"<!-- {size:,} {name}: recall_at_10 text to image, image to text: {both} -->")


if __name__ == "__main__":
    main()
