#!/usr/bin/env python
"""What a resumed run spends on the samples that it skips, and whether the loader's memory stays flat.

    python -m benchmarks loader_resume --images PHOTOS

Resume: shards of 100,000 photos (those of --images again and again, as in the benchmark loader). A fresh process opens them
(the index from the cache), asks for the last batch of the first epoch, and we compare the CPU time until it is there with
that of a process that asks for the first batch; the difference is the skip. Beside it: what reading and decoding the
skipped samples costs, by the rate of whole batches in the same process. With unique_products a resumed run walks the order
from its beginning, so both ways are shown.

Memory: ten epochs over 2,000 of the photos, resident memory of the process after each.
"""

import argparse
import json
import os
import platform
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.harness import in_own_process
from benchmarks.speed.loader import _BATCH_SIZE, loader_of, write_photos

_SAMPLES_PER_SHARD = 1_000


def repeat_shards(photos: Path, out: Path, count: int) -> None:
    """Shards of ``count`` samples from those of ``write_photos``; each with a caption, and so a product, of three photos."""
    members = []
    for shard in sorted(photos.glob("photos.*.tar")):
        with tarfile.open(shard) as tar:
            members += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    for start in range(0, count, _SAMPLES_PER_SHARD):
        with tarfile.open(out / f"photos.{start // _SAMPLES_PER_SHARD:06d}.tar", "w") as tar:
            for number in range(start, min(count, start + _SAMPLES_PER_SHARD)):
                caption = f"Women Navy Striped Short Sleeve Crew Neck T-Shirt {number // 3}".encode()
                for name, data in ((f"{number:08d}.jpg", members[number % len(members)]), (f"{number:08d}.txt", caption)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


def first_batch_s(shards: list[Path], step: int, unique: bool) -> dict[str, float]:
    """CPU seconds from nothing to the batch of ``step``; then the rate of whole batches, without tokens that are known."""
    torch.set_num_threads(1)
    started = time.process_time()
    with loader_of(shards, first_step=step, unique_products=unique) as batches:
        next(batches)
        until_first = time.process_time() - started
        started, samples = time.process_time(), 0
        while time.process_time() - started < 4:
            samples += len(next(batches).keys)
        return {"until_first_s": until_first, "samples_per_s": samples / (time.process_time() - started)}


def memory_mb(shards: list[Path], num_epochs: int) -> list[float]:
    torch.set_num_threads(1)
    megabytes = list[Any]()
    with loader_of(shards, first_step=0, unique_products=False) as batches:
        samples = 0
        for batch in batches:
            samples += len(batch.keys)
            if samples >= (len(megabytes) + 1) * 2_000:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                if len(megabytes) == num_epochs:
                    return megabytes
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG photos (default: synthetic garments)")
    parser.add_argument("--count", type=int, default=100_000, help="photos (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=4, metavar=("WHAT", "SHARDS", "STEP", "UNIQUE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        what, folder, step, unique = arguments.only
        shards = sorted(Path(folder).glob("photos.*.tar"))
        print(json.dumps(memory_mb(shards, 10) if what == "memory" else first_batch_s(shards, int(step), unique == "True")))
        return
    with tempfile.TemporaryDirectory() as folder:
        photos, many = Path(folder, "photos"), Path(folder, "many")
        photos.mkdir()
        many.mkdir()
        write_photos(arguments.images, photos, 2_000)
        repeat_shards(photos, many, arguments.count)

        def run(what: str, shards: Path, step: int = 0, unique: bool = False) -> Any:
            environment = {"FASHIONCLIP_CACHE": f"{folder}/cache"}
            return in_own_process(__file__, "--only", what, shards, step, unique, environment=environment)

        run("resume", many)  # makes the index and fills the page cache
        last = arguments.count // _BATCH_SIZE - 1
        print(f"{arguments.count:,} photos; {platform.machine()}, Python {platform.python_version()}, one thread")
        print("| order | to the first batch, s | to the last one, s | skip, s | reading the skipped, s | share |")
        print("|---|---|---|---|---|---|")
        for unique in (False, True):
            for _ in range(arguments.rounds):
                start, end = run("resume", many, 0, unique), run("resume", many, last, unique)
                skip = end["until_first_s"] - start["until_first_s"]
                reading = last * _BATCH_SIZE / end["samples_per_s"]
                name = "unique_products" if unique else "plain"
                figures = f"{start['until_first_s']:.2f} | {end['until_first_s']:.2f} | {skip:.3f} | {reading:.1f}"
                print(f"| {name} | {figures} | {skip / reading:.2%} |")
        memory = run("memory", photos)
        print("resident MB after each of ten epochs over 2,000 photos: " + ", ".join(f"{value:.0f}" for value in memory))


if __name__ == "__main__":
    main()
