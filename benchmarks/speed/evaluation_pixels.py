#!/usr/bin/env python
"""Photos a CPU second of an evaluation, and of its pixels alone: decoded, kept for the first time, or read as they were kept.

    python -m benchmarks evaluation_pixels --images PHOTOS --rounds 5

Photos as in ``loader``, at 224 pixels, and a tower so small that little else counts. ``decoded``: where there is no room to
keep pixels; ``first``: with an empty cache; ``kept``: in a new process, after another one has evaluated. Each is a process of
its own, in turn; the embeddings of all are the same to the bit, or this says so and fails.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.harness import in_own_process, in_turn, median_ratio, spread
from benchmarks.speed.loader import write_photos

_WAYS = ("decoded", "first", "kept")


def measure(folder: Path, way: str, threads: int) -> dict[str, Any]:
    """CPU seconds of an evaluation's pixels alone, and of an evaluation, without what is set up before it."""
    import open_clip

    from fashionclip_tune.data.preprocessing import Preprocessing
    from fashionclip_tune.data.shard_cache import ShardStorage
    from fashionclip_tune.evaluation.dataset import evaluation_set, pixel_blocks
    from fashionclip_tune.evaluation.encode import embed
    from fashionclip_tune.files import cache_dir
    from fashionclip_tune.models.openclip import LoadedModel
    from fashionclip_tune.models.precision import PrecisionPlan

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vision = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 1, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49_408, "width": 64, "heads": 2, "layers": 1}
    network = open_clip.CLIP(64, vision, text)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocessing = Preprocessing(224, mean, std, "shortest", "bicubic")
    loaded = LoadedModel("tiny", network, preprocessing, open_clip.get_tokenizer("ViT-B-32"), {}, "", True)
    shards = tuple(sorted(folder.glob("photos.*.tar")))
    photos = evaluation_set(shards, preprocessing, ShardStorage(max_bytes=1 if way == "decoded" else 20 * 10**9))
    measured: dict[str, Any] = {}

    def pixels() -> None:
        for _ in pixel_blocks(photos, 64):
            pass

    def evaluation() -> None:
        plan = PrecisionPlan(torch.device("cpu"), None)
        pool = embed(loaded, photos, all_captions=False, batch_size=64, plan=plan, max_bad_share=0)[0]
        measured["digest"] = hashlib.sha256(pool.images_ND.numpy().tobytes() + pool.captions_VD.numpy().tobytes()).hexdigest()

    for work in (pixels, evaluation):
        if way == "first":
            shutil.rmtree(cache_dir() / "pixels", ignore_errors=True)
        started = time.process_time()
        work()
        measured[work.__name__] = time.process_time() - started
    photos.reader.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG photos (default: synthetic garments)")
    parser.add_argument("--count", type=int, default=3_000, help="photos (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each evaluation (default: %(default)s)")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(Path(arguments.only[1]), arguments.only[0], arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_photos(arguments.images, Path(folder), arguments.count)

        def measured_alone(way: str) -> dict[str, Any]:
            flags = ("--only", way, folder, "--threads", arguments.threads)
            cache = f"{folder}/{'no_pixels' if way == 'decoded' else 'cache'}"
            return dict(in_own_process(__file__, *flags, environment={"FASHIONCLIP_CACHE": cache}))

        found = in_turn(_WAYS, arguments.rounds, measured_alone)
    print(f"{arguments.count:,} photos, short side 256, to 224 pixels; {arguments.threads} threads, {arguments.rounds} rounds")
    print("| pixels | alone, photos/CPU-s | lowest | highest | evaluation, photos/CPU-s | lowest | highest | gain | gain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for way, runs in found.items():
        seconds = {work: [run[work] for run in runs] for work in ("pixels", "evaluation")}
        rates = [spread([arguments.count / each for each in measured], ",.0f") for measured in seconds.values()]
        gains = [median_ratio([run[work] for run in found["decoded"]], each) for work, each in seconds.items()]
        print(f"| {way} | {' | '.join(rates)} | {' | '.join(f'{gain:.2f}' for gain in gains)} |")
    if len({run["digest"] for runs in found.values() for run in runs}) > 1:
        sys.exit("embeddings differ")


if __name__ == "__main__":
    main()
