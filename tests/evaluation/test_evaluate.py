"""Evaluation against a slow reference, and what must not change a bit of it."""

import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from fashionclip_tune.config.choices import RetrievalProtocol as Protocol
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.dataset import cached_index
from fashionclip_tune.data.shards import ShardSample, find_dataset, write_split
from fashionclip_tune.errors import BadDataError, UserError
from fashionclip_tune.evaluation import dataset as evaluation_set_module
from fashionclip_tune.evaluation import evaluate as evaluate_module
from fashionclip_tune.evaluation.dataset import EvaluationSet, evaluation_set
from fashionclip_tune.evaluation.encode import embed
from fashionclip_tune.evaluation.evaluate import Evaluation, cached_zero_shot, evaluate
from fashionclip_tune.evaluation.protocols import QUERIES_FILE, load_retrieval, retrieve
from fashionclip_tune.files import cache_dir
from fashionclip_tune.models.openclip import LoadedModel, load_model
from fashionclip_tune.models.precision import PrecisionPlan, plan_precision
from fashionclip_tune.training.train import train

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
    again = cached_zero_shot(loaded, photos, batch_size=8, plan=CPU, max_bad_share=0.01)
    for direction in ("text_to_image", "image_to_text"):
        ranks, expected = (getattr(found.retrieval, direction).ranks for found in (again, evaluated(loaded, photos)))
        assert torch.equal(ranks.num_better, expected.num_better)
    entries[0].write_text(json.dumps({"metrics": {"from": "the cache"}, "bad_samples": [], "answers": []}))
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


def test_trials_that_ask_at_the_same_time_wait_for_the_first(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    loaded = load_model(tiny_config)
    photos = validation(loaded, garments)
    computing, computed = threading.Event(), list[str]()

    def slow(*arguments: Any, **settings: Any) -> Evaluation:
        computing.set()
        time.sleep(0.3)
        computed.append(threading.current_thread().name)
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(evaluate_module, "evaluate", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(zero_shot, loaded, photos)
        assert computing.wait(60)
        second = pool.submit(zero_shot, loaded, photos)
        assert first.result() == second.result()
    assert len(computed) == 1


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
    entry.with_suffix(".npz").write_bytes(b"PK cut off")
    assert zero_shot(loaded, validation(loaded, garments)) == computed
    assert load_retrieval(entry.with_suffix(".npz"))[0].protocol is Protocol.INSTANCE


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_protocols_and_what_their_figures_stand_on(tiny_config: ProjectConfig, garments: Path) -> None:
    """20 photos of 10 products, two each, with three captions a photo."""
    loaded = load_model(tiny_config)
    photos = validation(loaded, garments)
    by_protocol = {protocol: measured(loaded, photos, protocol=protocol) for protocol in NO_CATEGORIES}
    assert [metrics["protocol"] for metrics in by_protocol.values()] == ["instance", "product", "all_captions"]
    sizes = ("num_text_queries", "num_image_queries", "num_gallery_images", "num_gallery_texts", "num_pairs", "num_products")
    assert {protocol.value: [metrics[size] for size in sizes] for protocol, metrics in by_protocol.items()} == {
        "instance": [20, 20, 20, 20, 20, 10],
        "product": [10, 20, 20, 10, 20, 10],
        "all_captions": [60, 20, 20, 60, 20, 10],
    }
    for metrics in by_protocol.values():
        assert 0 <= metrics["recall_at_10_low"] <= metrics["recall_at_10"] <= metrics["recall_at_10_high"] <= 1
        assert 1 <= metrics["median_rank_text_to_image"] <= metrics["num_gallery_images"]
    # Any of two photos, among the same twenty, is at least as easy as one of them.
    of_product, of_instance = by_protocol[Protocol.PRODUCT], by_protocol[Protocol.INSTANCE]
    assert of_product["recall_at_5_text_to_image"] >= of_instance["recall_at_5_text_to_image"]
    with pytest.raises(UserError, match="here are 2 at most"):
        measured(loaded, photos, protocol=Protocol.CANDIDATES_101)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_every_caption_is_asked_however_many_a_photo_has(tiny_config: ProjectConfig, many_captions: Path) -> None:
    loaded = load_model(tiny_config)
    photos = validation(loaded, many_captions)
    num_captions = [5 if number == 0 else 1 + number % 7 for number in range(20)]
    assert photos.reader.index.num_captions.tolist() == num_captions
    metrics = measured(loaded, photos, protocol=Protocol.ALL_CAPTIONS)
    assert (metrics["num_text_queries"], metrics["num_gallery_texts"]) == (sum(num_captions), sum(num_captions))
    assert metrics["num_image_queries"] == 20
    # One row a photo and a column a caption, as a pool may be written too, has the same ranks of the same queries in order.
    pool, *_ = embed(loaded, photos, all_captions=True, batch_size=8, plan=CPU, max_bad_share=0.01)
    assert pool.further_F2 is not None
    rows_NK = torch.full((20, 7), -1)
    rows_NK[:, :1] = pool.caption_rows_NK
    for photo in range(20):
        further = pool.further_F2[pool.further_F2[:, 0] == photo, 1]
        rows_NK[photo, 1 : 1 + len(further)] = further
    padded = retrieve(replace(pool, caption_rows_NK=rows_NK, further_F2=None), Protocol.ALL_CAPTIONS)
    for ours, theirs in zip(retrieve(pool, Protocol.ALL_CAPTIONS).hits(10), padded.hits(10), strict=True):
        assert ours.products_Q.tolist() == theirs.products_Q.tolist()
        assert ours.values_Q.tolist() == theirs.values_Q.tolist()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_captions_of_an_unreadable_photo_are_left_out_all_of_them(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path
) -> None:
    loaded = load_model(tiny_config)
    captions = [tuple(f"{number} {i}" for i in range(1 + number % 5)) for number in range(20)]
    samples = [
        ShardSample(key=f"k{i}", jpeg=encoded(photo)[: 30 if i == 3 else None], captions=captions[i], product_id=str(i))
        for i, (photo, _) in enumerate(pairs(find_dataset(garments).valid))
    ]
    write_split(tmp_path, "valid", samples)
    write_split(tmp_path / "rest", "valid", [sample for i, sample in enumerate(samples) if i != 3])
    name = "clip_dataset_valid.000000.tar"
    all_of, rest = (evaluation_set((tmp_path / folder / name,), loaded.preprocessing) for folder in ("", "rest"))
    settings = {"protocol": Protocol.ALL_CAPTIONS, "max_bad_share": 0.05}
    metrics = measured(loaded, all_of, **settings)
    assert metrics["num_text_queries"] == sum(map(len, captions)) - len(captions[3])
    assert metrics == pytest.approx(measured(loaded, rest, **settings), abs=1e-9)


NO_CATEGORIES = (Protocol.INSTANCE, Protocol.PRODUCT, Protocol.ALL_CAPTIONS)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_each_distinct_caption_is_encoded_once(tiny_config: ProjectConfig, garments: Path) -> None:
    loaded = load_model(tiny_config)
    photos = validation(loaded, garments)
    tokenizer, asked = loaded.tokenizer, list[str]()

    def counting(texts: Any) -> torch.Tensor:
        asked.extend(texts)
        return tokenizer(texts)

    loaded.tokenizer = counting
    first = {caption for _, caption in pairs(find_dataset(garments).valid)}
    measured(loaded, photos)
    assert sorted(asked) == sorted(first)
    asked.clear()
    measured(loaded, photos, protocol=Protocol.ALL_CAPTIONS)
    assert len(asked) == len(set(asked)) > len(first)
    assert set(asked) > first


def test_in_a_larger_gallery_recall_falls_and_the_queries_stay(tiny_config: ProjectConfig, garments: Path) -> None:
    loaded = load_model(tiny_config)
    found = find_dataset(garments)
    alone = measured(loaded, evaluation_set(found.valid, loaded.preprocessing))
    among_all = measured(loaded, evaluation_set(found.valid, loaded.preprocessing, gallery=found.train + found.test))
    assert (among_all["num_pairs"], among_all["num_gallery_images"], among_all["num_gallery_texts"]) == (20, 200, 200)
    assert among_all["num_text_queries"] == among_all["num_image_queries"] == 20
    assert among_all["recall_at_10"] < alone["recall_at_10"]
    assert among_all["median_rank_text_to_image"] > alone["median_rank_text_to_image"]


def test_photos_are_decoded_ahead_in_their_order_and_a_few_blocks_at_a_time(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(tiny_config)
    photos = evaluation_set(find_dataset(garments).train, loaded.preprocessing)
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    read = 0
    image = photos.reader.image

    def counting(sample: int) -> bytes:
        nonlocal read
        read += 1
        return image(sample)

    monkeypatch.setattr(photos.reader, "image", counting)
    torch.set_num_threads(3)
    for number, (start, block) in enumerate(evaluation_set_module.pixel_blocks(photos, 8)):
        assert start == 8 * number
        assert read <= start + 8 * 5  # this block, four ahead
        for slot in block.good:
            expected = loaded.preprocessing.resize(Image.open(io.BytesIO(image(start + slot))))
            assert torch.equal(block.pixels_BCHW[slot], expected)
    assert read == 160
    photos.reader.close()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_photos_that_cannot_be_evaluated_are_listed_at_the_end_of_a_run(
    tiny_config: ProjectConfig, garments: Path, damaged: tuple[Path, ...], tmp_path: Path
) -> None:
    for shard in find_dataset(garments).train:
        (damaged[0].parent / shard.name).symlink_to(shard)
    config = replace(
        tiny_config,
        dataset_root=damaged[0].parent,
        train_shards_pattern="clip_dataset_train_aug.000000.tar",
        valid_shards_pattern=damaged[0].name,
    ).with_overrides({"training.budget_examples": 32, "training.max_bad_share": 0.06})
    expected = [(damaged[0].name, "k3")]
    result = train(config, tmp_path / "run")
    assert [sample[:2] for sample in result.bad_samples] == expected
    # The zero-shot weights' figure comes from the cache now, and what could not be read with it.
    again = train(config, tmp_path / "again")
    assert [sample[:2] for sample in again.bad_samples] == expected


def test_the_queries_of_the_last_evaluation_are_kept(tiny_config: ProjectConfig, tmp_path: Path) -> None:
    config = tiny_config.with_overrides({"training.budget_examples": 64, "evaluation.protocol": "product"})
    result = train(config, tmp_path)
    retrieval, about = load_retrieval(tmp_path / QUERIES_FILE)
    assert about["step"] == result.history[-1]["step"] == 4
    assert retrieval.protocol is Protocol.PRODUCT
    assert {row["protocol"] for row in result.history} == {"product"}
    texts, images = retrieval.hits(10)
    assert (texts.values_Q.mean() + images.values_Q.mean()) / 2 == pytest.approx(result.metrics["recall_at_10"], abs=1e-12)


def test_a_shard_that_vanishes_is_told_of_its_captions_or_counts_photo_by_photo(
    tiny_config: ProjectConfig, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path))
    loaded = load_model(tiny_config)
    (shard,) = find_dataset(garments).valid
    copy = Path(shutil.copy(shard, tmp_path))
    photos = evaluation_set((copy,), loaded.preprocessing)
    copy.rename(tmp_path / "gone")
    with pytest.raises(BadDataError, match=r"shard cannot be read \(No such file"):
        measured(loaded, photos, max_bad_share=0.5)
    (tmp_path / "other").mkdir()
    other = Path(shutil.copy(shard, tmp_path / "other"))
    cached_index((other,))
    other.unlink()
    with pytest.raises(BadDataError, match="captions to evaluate on are lost: clip_dataset_valid_aug"):
        evaluation_set((other,), loaded.preprocessing)
