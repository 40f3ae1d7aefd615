"""Evaluation against a slow reference, and what must not change a bit of it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from fashionclip_tune import evaluation_set as evaluation_set_module
from fashionclip_tune.cache import cache_dir
from fashionclip_tune.config import ProjectConfig, Protocol
from fashionclip_tune.errors import BadDataError
from fashionclip_tune.evaluate import Evaluation, cached_zero_shot, evaluate
from fashionclip_tune.evaluation_set import EvaluationSet, evaluation_set
from fashionclip_tune.model import LoadedModel, load_model
from fashionclip_tune.precision import PrecisionPlan, plan_precision
from fashionclip_tune.shards import ShardSample, find_dataset, write_split
from fashionclip_tune.training import train

CPU = PrecisionPlan(torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def evaluated(loaded: LoadedModel, photos: EvaluationSet, **changes: Any) -> Evaluation:
    return evaluate(loaded, photos, **{"batch_size": 8, "plan": CPU, "max_bad_share": 0.01, **changes})


def measured(loaded: LoadedModel, photos: EvaluationSet, **changes: Any) -> dict[str, Any]:
    return evaluated(loaded, photos, **changes).metrics


def validation(loaded: LoadedModel, root: Path) -> EvaluationSet:
    return evaluation_set(find_dataset(root).valid, loaded.preprocessing)


def encoded(photo: Image.Image) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    return buffer.getvalue()


def pairs(shards: tuple[Path, ...]) -> list[tuple[Image.Image, str]]:
    """Photos and first captions, read by WebDataset and decoded by Pillow."""
    found = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    return [(Image.open(io.BytesIO(sample["jpg"])), sample["txt0.txt"].decode()) for sample in found]


def expected_recall(similarity_QN: torch.Tensor, tied_with: list[set[int]], k: int) -> float:
    """Right is item q for query q only. Items of ``tied_with[q]`` are indistinguishable from it: each order is as likely."""
    hits = 0.0
    for query, scores in enumerate(similarity_QN.tolist()):
        better = sum(score > scores[query] for item, score in enumerate(scores) if item not in tied_with[query])
        hits += min(max(k - better, 0), len(tied_with[query])) / len(tied_with[query])
    return hits / len(similarity_QN)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sig"])
def test_recall_equals_a_slow_reference(tiny_config: ProjectConfig, garments: Path, name: str) -> None:
    loaded = load_model(replace(tiny_config, clip_model=name))
    read = pairs(find_dataset(garments).valid)
    captions = [caption for _, caption in read]
    assert len(read) == 20
    assert len(set(captions)) < 20, "views share captions: ties are what makes this hard"
    loaded.network.eval()
    with torch.no_grad():
        images = torch.stack(
            [
                loaded.network.encode_image(
                    loaded.preprocessing.normalise(loaded.preprocessing.resize(photo)[None].float() / 255), normalize=True
                )[0]
                for photo, _ in read
            ]
        )
        texts = torch.stack(
            [loaded.network.encode_text(loaded.tokenizer([caption]), normalize=True)[0] for caption in captions]
        )
    similarity = (images.double() @ texts.double().T).float()
    same_caption = [{j for j, other in enumerate(captions) if other == caption} for caption in captions]

    metrics = measured(loaded, validation(loaded, garments))
    for k in (1, 5, 10):
        image_to_text = expected_recall(similarity, same_caption, k)
        text_to_image = expected_recall(similarity.T, [{i} for i in range(20)], k)
        assert metrics[f"recall_at_{k}_image_to_text"] == pytest.approx(image_to_text, abs=1e-6)
        assert metrics[f"recall_at_{k}_text_to_image"] == pytest.approx(text_to_image, abs=1e-6)
        assert metrics[f"recall_at_{k}"] == pytest.approx((image_to_text + text_to_image) / 2, abs=1e-6)
    assert metrics["num_pairs"] == 20


def test_the_training_batch_changes_no_bit(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    """The learning rate is so small that no weight moves: any difference would come from the evaluation."""
    config = tiny_config.with_overrides({"training.learning_rate": 1e-30, "training.weight_decay": 0.0})
    other = config.with_overrides(
        {
            "training.batch_size": 40,
            "training.stage_examples": 40,
            "training.budget_examples": 40,
        }
    )
    rows = [train(run, tmp_path / str(number)).history for number, run in enumerate((config, other))]
    figures = [{name: value for name, value in row.items() if "recall" in name} for run in rows for row in run]
    assert len(figures) == 8
    assert all(figure == figures[0] for figure in figures)


def test_only_the_last_block_is_padded_and_padding_does_not_count(tiny_config: ProjectConfig, garments: Path) -> None:
    loaded = load_model(tiny_config)
    photos = validation(loaded, garments)
    by_block = [measured(loaded, photos, batch_size=size) for size in (1, 7, 20, 64)]
    assert all(metrics == pytest.approx(by_block[0], abs=1e-6) for metrics in by_block)


def test_kept_pixels_and_pixels_read_anew_agree(
    tiny_config: ProjectConfig, garments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(tiny_config)
    photos = validation(loaded, garments)
    photos.kept_blocks.clear()
    reads = 0
    decode = evaluation_set_module.decode_pil

    def counting(data: bytes) -> Any:
        nonlocal reads
        reads += 1
        return decode(data)

    monkeypatch.setattr(evaluation_set_module, "decode_pil", counting)
    first, again = measured(loaded, photos), measured(loaded, photos)
    assert first == again
    assert reads == 20  # one for each photo: the second evaluation read none
    photos.kept_blocks.clear()
    monkeypatch.setattr(evaluation_set_module, "_KEPT_PIXELS_BYTES", 20 * 3 * 32 * 32 - 1)
    assert [measured(loaded, photos), measured(loaded, photos)] == [first, first]
    assert reads == 60


def test_evaluation_leaves_the_training_mode_as_it_was(tiny_config: ProjectConfig, garments: Path) -> None:
    loaded = load_model(tiny_config)
    for training in (True, False):
        loaded.network.train(training)
        measured(loaded, validation(loaded, garments))
        assert all(module.training is training for module in loaded.network.modules())


@pytest.fixture
def damaged(garments: Path, tmp_path: Path) -> tuple[Path, ...]:
    """The validation set, its 4th photo cut after 30 bytes."""
    samples = [
        ShardSample(key=f"k{i}", jpeg=encoded(photo)[: 30 if i == 3 else None], captions=(caption,), product_id=str(i))
        for i, (photo, caption) in enumerate(pairs(find_dataset(garments).valid))
    ]
    write_split(tmp_path, "valid", samples)
    write_split(tmp_path / "rest", "valid", [sample for i, sample in enumerate(samples) if i != 3])
    return (tmp_path / "clip_dataset_valid.000000.tar",)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_unreadable_photo_is_left_out_with_its_caption(tiny_config: ProjectConfig, damaged: tuple[Path, ...]) -> None:
    loaded = load_model(tiny_config)
    rest = (damaged[0].parent / "rest" / damaged[0].name,)
    metrics = measured(loaded, evaluation_set(damaged, loaded.preprocessing), max_bad_share=0.05)
    assert metrics["num_pairs"] == 19
    assert metrics == pytest.approx(measured(loaded, evaluation_set(rest, loaded.preprocessing)), abs=1e-9)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_more_unreadable_photos_than_allowed_stop_with_the_list(tiny_config: ProjectConfig, damaged: tuple[Path, ...]) -> None:
    loaded = load_model(tiny_config)
    with pytest.raises(BadDataError, match=r"(?s)1 of 20 samples.*clip_dataset_valid.000000.tar: k3: "):
        measured(loaded, evaluation_set(damaged, loaded.preprocessing), max_bad_share=0.049)


def zero_shot(loaded: LoadedModel, photos: EvaluationSet, **changes: Any) -> dict[str, Any]:
    return cached_zero_shot(loaded, photos, **{"batch_size": 8, "plan": CPU, "max_bad_share": 0.01, **changes}).metrics


def test_zero_shot_is_computed_once_for_the_same_weights_and_again_for_others(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    loaded = load_model(tiny_config)
    photos = validation(loaded, garments)
    computed = zero_shot(loaded, photos)
    assert computed == measured(loaded, photos)

    entries = list((tmp_path / "zero_shot").glob("*.json"))
    assert len(entries) == 1
    entries[0].write_text(json.dumps({"metrics": {"from": "the cache"}, "bad_samples": []}))
    assert zero_shot(load_model(tiny_config), photos) == {"from": "the cache"}

    others = load_model(tiny_config.with_overrides({"training.seed": 1}))
    assert zero_shot(others, photos) == measured(others, photos) != computed
    on_two = replace(loaded, preprocessing=replace(loaded.preprocessing, mean=(0.1, 0.1, 0.1)))
    assert "from" not in zero_shot(on_two, photos)
    bf16 = plan_precision(tiny_config.with_overrides({"hardware.precision": "bf16"}))
    assert "from" not in zero_shot(loaded, photos, plan=bf16)
    assert "from" not in zero_shot(loaded, evaluation_set(find_dataset(garments).test, loaded.preprocessing))
    assert "from" not in zero_shot(loaded, photos, batch_size=7)
    assert "from" not in zero_shot(loaded, photos, protocol=Protocol.PRODUCT)
    assert len(list((tmp_path / "zero_shot").glob("*.json"))) == 7


def test_a_damaged_zero_shot_entry_is_made_again(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    loaded = load_model(tiny_config)
    computed = zero_shot(loaded, validation(loaded, garments))
    (entry,) = (cache_dir() / "zero_shot").glob("*.json")
    entry.write_text('{"recall_at_1')
    assert zero_shot(loaded, validation(loaded, garments)) == computed
    assert json.loads(entry.read_text())["metrics"] == computed
