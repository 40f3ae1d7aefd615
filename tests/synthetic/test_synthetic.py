import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from fashionclip_tune.data.shards import SPLITS, find_dataset
from fashionclip_tune.errors import UserError
from fashionclip_tune.synthetic import COLLECTIONS, GarmentRecipe, cached_dataset, render_dataset
from fashionclip_tune.synthetic import dataset as synthetic
from fashionclip_tune.synthetic.garments import KINDS

SMALL = GarmentRecipe(num_products=20, views_per_product=2, image_size=32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path, split: str) -> dict[str, bytes]:
    read = {}
    for shard in getattr(find_dataset(folder), split):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                read[member.name] = file.read()
    return read


@pytest.fixture(scope="module", params=COLLECTIONS)
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    render_dataset(folder, GarmentRecipe(collection=request.param, num_products=40))
    return folder


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    render_dataset(tmp_path / "a", SMALL)
    render_dataset(tmp_path / "b", GarmentRecipe(num_products=20, views_per_product=2, image_size=32))
    render_dataset(tmp_path / "c", GarmentRecipe(num_products=20, views_per_product=2, image_size=32, seed=1))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for split in SPLITS:
        assert members(tmp_path / "a", split) != members(tmp_path / "c", split)


def test_a_product_looks_the_same_in_a_larger_data_set() -> None:
    larger = GarmentRecipe(num_products=30, views_per_product=2, image_size=32)
    assert list(synthetic._product_samples(SMALL, 7)) == list(synthetic._product_samples(larger, 7))


def test_products_are_split_80_10_10_and_none_is_in_two_splits(rendered: Path) -> None:
    described = json.loads((rendered / "dataset.json").read_text())
    assert {name: (split["products"], split["samples"]) for name, split in described["splits"].items()} == {
        "train": (32, 96),
        "valid": (4, 12),
        "test": (4, 12),
    }
    assert "num_products=40" in described["source"]
    products = [{name.split("_")[0] for name in members(rendered, split)} for split in SPLITS]
    assert sum(map(len, products)) == len(set.union(*products)) == 40


def test_every_photo_has_three_captions_shared_by_all_views_of_its_product(rendered: Path) -> None:
    captions: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    read = members(rendered, "train")
    for name in read:
        if name.endswith(".jpg"):
            key = name.removesuffix(".jpg")
            record = json.loads(read[f"{key}.json"])
            assert record["category"] in KINDS
            assert record["product_id"] == key.split("_")[0]
            captions[record["product_id"]].add(tuple(read[f"{key}.txt{i}.txt"].decode() for i in range(3)))
    assert len(captions) == 32
    for of_product in captions.values():
        assert len(of_product) == 1
        assert len(set(next(iter(of_product)))) == 3


@pytest.mark.parametrize("size", [16, 33, 64])
def test_photos_have_the_size_asked_for_and_differ_between_views(size: int) -> None:
    samples = list(synthetic._product_samples(GarmentRecipe(image_size=size), 0))
    assert len({sample.jpeg for sample in samples}) == 3
    for sample in samples:
        image = Image.open(io.BytesIO(sample.jpeg))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size))


def test_the_collections_share_no_product_and_pretraining_knows_less() -> None:
    drawn = {
        collection: [
            sample
            for number in range(60)
            for sample in synthetic._product_samples(
                GarmentRecipe(collection=collection, image_size=16, views_per_product=1), number
            )
        ]
        for collection in COLLECTIONS
    }
    sweep, pretraining = drawn["sweep"], drawn["pretraining"]
    assert not {sample.jpeg for sample in sweep} & {sample.jpeg for sample in pretraining}
    assert not {sample.captions[0] for sample in sweep} & {sample.captions[0] for sample in pretraining}
    assert {sample.category for sample in pretraining} < {sample.category for sample in sweep}
    for attribute in ("colour", "pattern"):
        known = {sample.attributes[attribute] for sample in pretraining}
        assert known < {sample.attributes[attribute] for sample in sweep}


def test_progress_counts_products_up_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    render_dataset(tmp_path, SMALL, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 20) for done in range(1, 21)]


def test_the_cache_renders_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached_dataset(SMALL, tmp_path)
    assert folder.parent == tmp_path / "synthetic"
    assert folder.name.startswith("sweep-")
    render_dataset(tmp_path / "direct", SMALL)
    assert contents(folder) == contents(tmp_path / "direct")
    monkeypatch.setattr(synthetic, "render_dataset", lambda *_, **__: pytest.fail("rendered again"))
    assert cached_dataset(SMALL, tmp_path) == folder


def test_the_cache_has_a_folder_for_each_recipe_and_renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"num_products": 10, "views_per_product": 1, "image_size": 16}
    folders = {
        cached_dataset(GarmentRecipe(**tiny), tmp_path),
        cached_dataset(GarmentRecipe(**tiny, seed=1), tmp_path),
        cached_dataset(GarmentRecipe(**tiny, collection="pretraining"), tmp_path),
    }
    monkeypatch.setattr(synthetic, "RENDERER_VERSION", -1)
    folders.add(cached_dataset(GarmentRecipe(**tiny), tmp_path))
    assert len(folders) == 4


def test_the_cache_survives_what_a_killed_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(out_dir: Path, *_: object, **__: object) -> None:
        out_dir.mkdir(parents=True)
        (out_dir / "clip_dataset_train_aug.000000.tar.tmp").write_bytes(b"half a shard")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "render_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_dataset(SMALL, tmp_path)
    assert list((tmp_path / "synthetic").glob("*/*.tmp"))  # the left-over is there
    folder = cached_dataset(SMALL, tmp_path)
    render_dataset(tmp_path / "direct", SMALL)
    assert contents(folder) == contents(tmp_path / "direct")
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_the_cache_replaces_a_folder_whose_description_is_gone(tmp_path: Path) -> None:
    folder = cached_dataset(SMALL, tmp_path)
    before = contents(folder)
    (folder / "dataset.json").unlink()
    assert contents(cached_dataset(SMALL, tmp_path)) == before


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("collection", "shoes", "sweep, pretraining"),
        ("num_products", 9, "10 to 999999"),
        ("num_products", 1_000_000, "10 to 999999"),
        ("views_per_product", 0, "1 to 100"),
        ("views_per_product", 2.0, "whole number"),
        ("image_size", 8, "16 to 512"),
        ("image_size", True, "whole number"),
        ("seed", -1, "from 0"),
    ],
)
def test_an_invalid_recipe_is_refused_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        GarmentRecipe(**{field: value})
    assert str(error.value).startswith(f"{field} is {value!r}: ")
    assert allowed in str(error.value)
