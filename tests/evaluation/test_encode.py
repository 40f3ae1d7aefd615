"""How fast a model encodes: what is timed, and that the figure changes no other."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import run_shards
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.evaluation import dataset as dataset_module
from fashionclip_tune.evaluation import encode as encoding_module
from fashionclip_tune.evaluation.dataset import evaluation_set
from fashionclip_tune.evaluation.encode import BlockClock, EncodingSpeed, embed
from fashionclip_tune.models.openclip import load_model
from fashionclip_tune.models.precision import PrecisionPlan
from fashionclip_tune.training.evaluator import RunEvaluator
from fashionclip_tune.training.history import read_history
from fashionclip_tune.training.train import train

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still but for what is added to it."""
    now = [100.0]
    monkeypatch.setattr(encoding_module.time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_a_block_takes_the_median_and_what_lies_between_blocks_does_not_count(clock: Callable[[float], None]) -> None:
    blocks = BlockClock(CPU)
    for seconds in (9.0, 0.25, 0.5, 0.25, 0.25):
        with blocks.block():
            clock(seconds)
        clock(50)
    assert blocks.seconds_a_block() == 0.25


def test_speeds_are_of_the_towers_alone(
    tiny_config: ProjectConfig, garments: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 photos in 3 blocks of 8, the last one padded: a block is as much work as any other."""
    loaded = load_model(tiny_config)
    photos = evaluation_set(find_dataset(garments).valid, loaded.preprocessing)
    for tower, seconds in (("encode_image", 0.5), ("encode_text", 0.125)):
        encode = getattr(loaded.network, tower)

        def timed(*given: Any, encode: Any = encode, seconds: Any = seconds, **named: Any) -> Any:
            clock(seconds)
            return encode(*given, **named)

        monkeypatch.setattr(loaded.network, tower, timed)
    decode = encoding_module.pixel_blocks

    def slowly_decoded(*given: Any, **named: Any) -> Iterator[Any]:
        for block in decode(*given, **named):
            clock(30)
            yield block

    monkeypatch.setattr(encoding_module, "pixel_blocks", slowly_decoded)
    _, _, speed = embed(loaded, photos, all_captions=False, batch_size=8, plan=PrecisionPlan(CPU, None), max_bad_share=0)
    assert speed == EncodingSpeed(8 / 0.5, 8 / 0.125)


def test_runs_record_their_speed_and_zero_shot_from_the_cache_has_none(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    short = tiny_config.with_overrides({"training.budget_examples": 32, "training.seed": 5})
    for name in ("first", "second"):
        train(short, tmp_path / name)
    first, second = (read_history(tmp_path / name) for name in ("first", "second"))
    fields = set(EncodingSpeed._fields)
    assert [fields <= set(row) for row in (*first, *second)] == [True, True, False, True]
    assert all(row[name] > 0 for row in (first[1], second[1]) for name in fields)


def test_a_runs_photos_are_decoded_by_the_cores_of_its_loader_processes_too(
    tiny_config: ProjectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads meet in their first photos. Beside a GPU training itself has one; the cores are the loader's."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    torch.set_num_threads(1)
    meeting, met, decode = threading.Barrier(2), set[int](), dataset_module.decode_pil

    def decode_together(data: bytes) -> Image.Image:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            meeting.wait(timeout=20)
        return decode(data)

    monkeypatch.setattr(dataset_module, "decode_pil", decode_together)
    config = tiny_config.with_overrides({"training.num_workers": 2, "evaluation.batch_size": 8})
    evaluator = RunEvaluator(
        config, run_shards(config), load_model(config), PrecisionPlan(CPU, None), lambda: None, lambda what, done, total: None
    )
    assert evaluator.evaluate()["num_pairs"] == 20
    assert len(met) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    device = torch.device("cuda")
    blocks = BlockClock(device)
    factor = torch.rand(4096, 4096, device=device)
    for _ in range(5):
        with blocks.block():
            factor @ factor
    assert 1e-5 < blocks.seconds_a_block() < 1
