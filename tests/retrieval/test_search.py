"""Photos by words: answers are OpenCLIP's own, each photo is embedded once, and vectors are whole or made anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fashionclip_tune.cli.main import main
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.data.tar_index import metadata_of
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.openclip import export_openclip, load_model
from fashionclip_tune.retrieval import nearest as nearest_module
from fashionclip_tune.retrieval import photo_vectors as photo_vectors_module
from fashionclip_tune.retrieval.search import SearchResult, search

SETTINGS = ProjectConfig(clip_model="tiny-clip", device="cpu").with_overrides({"model.pretrained": None, "hardware.threads": 1})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    export_openclip(load_model(SETTINGS), folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine photos, two of them in a sub-folder, and one that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(9):
        place = folder / "more" if number > 6 else folder
        noise = np.random.default_rng(number).integers(0, 255, (40, 32 + number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / f"{number}.{'png' if number % 2 else 'JPG'}", "PNG" if number % 2 else "JPEG")
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").write_text("no photo either")
    return folder


def found(model: str, folder: Path, tmp_path: Path, *words: str, **more: object) -> SearchResult:
    return search(model, str(folder), words=words or ("a red dress",), folder=tmp_path / "vectors", **more)


def ids(result: SearchResult) -> list[str]:
    return [answer.row["id"] for answer in result.searches[0].answers]


def test_the_answers_are_those_of_openclip(model: str, photos: Path, tmp_path: Path) -> None:
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model}")
    files = sorted(path for path in photos.rglob("*") if path.suffix in (".JPG", ".png"))
    with torch.no_grad():
        images_ND = network.eval().encode_image(torch.stack([transform(Image.open(file)) for file in files]), normalize=True)
        texts_QD = network.encode_text(open_clip.get_tokenizer(f"local-dir:{model}")(["red dress", "shoes"]), normalize=True)
    result = found(model, photos, tmp_path, "red dress", "shoes", photos=[files[4]], count=9)
    for answered, query_D in zip(result.searches, [*texts_QD, images_ND[4]], strict=True):
        expected = {str(file.relative_to(photos)): float(score) for file, score in zip(files, images_ND @ query_D, strict=True)}
        assert {answer.row["id"]: answer.score for answer in answered.answers} == pytest.approx(expected, abs=2e-3)
        scores = [answer.score for answer in answered.answers]
        assert scores == sorted(scores, reverse=True)
    assert result.searches[2].answers[0].row["id"] == str(files[4].relative_to(photos))


def test_a_second_start_embeds_what_is_new_and_forgets_what_is_gone(model: str, photos: Path, tmp_path: Path) -> None:
    assert "9 photos" in (first := found(model, photos, tmp_path)).about
    assert "9 of them new" in first.about
    written = (tmp_path / "vectors" / "vectors.npy").stat().st_mtime_ns
    assert "0 of them new" in found(model, photos, tmp_path).about
    assert (tmp_path / "vectors" / "vectors.npy").stat().st_mtime_ns == written, "a photo that is none writes nothing anew"
    kept = {row["id"]: row["checksum"] for row in pq.read_table(tmp_path / "vectors" / "photos.parquet").to_pylist()}
    (photos / "0.JPG").unlink()
    shutil.copy(photos / "1.png", photos / "another.png")
    Image.new("RGB", (30, 30), "red").save(photos / "2.JPG", "JPEG")
    changed = found(model, photos, tmp_path, count=20)
    assert "9 photos" in changed.about
    assert "2 of them new" in changed.about
    rows = pq.read_table(tmp_path / "vectors" / "photos.parquet").to_pydict()
    assert set(rows["id"]) == {*kept, "another.png"} - {"0.JPG"}
    vectors = np.load(tmp_path / "vectors" / "vectors.npy")
    assert vectors.shape == (9, 96)
    assert vectors.dtype == np.float16
    same = dict(zip(rows["id"], vectors, strict=True))
    assert np.array_equal(same["another.png"], same["1.png"]), "a photo has the same vector in any block"
    now = dict(zip(rows["id"], rows["checksum"], strict=True))
    assert now["2.JPG"] != kept["2.JPG"]
    assert all(now[name] == kept[name] for name in set(kept) & set(now) - {"2.JPG"})


def test_what_was_embedded_before_a_kill_is_kept(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_vectors_module, "_SAVED_EVERY_S", 0)

    def killed(done: int, total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    config = ProjectConfig().with_overrides({"evaluation.batch_size": 3})
    with pytest.raises(KeyboardInterrupt):
        found(model, photos, tmp_path, config=config, on_progress=killed)
    after = found(model, photos, tmp_path, count=20)
    assert "9 photos" in after.about
    assert "3 of them new" in after.about
    assert ids(after) == ids(search(model, str(photos), words=["a red dress"], count=20, folder=tmp_path / "afresh"))


@pytest.mark.parametrize("damage", ["vectors of another writing", "cut", "no rows", "a flipped bit"])
def test_vectors_that_are_not_whole_are_made_anew(model: str, photos: Path, tmp_path: Path, damage: str) -> None:
    expected = ids(found(model, photos, tmp_path, count=20))
    vectors, rows = (tmp_path / "vectors" / name for name in ("vectors.npy", "photos.parquet"))
    if damage == "vectors of another writing":
        np.save(vectors, np.load(vectors)[::-1].copy())
    elif damage == "cut":
        vectors.write_bytes(vectors.read_bytes()[:-10])
    elif damage == "no rows":
        rows.write_bytes(b"")
    else:
        data = bytearray(vectors.read_bytes())
        data[-1] ^= 1
        vectors.write_bytes(data)
    again = found(model, photos, tmp_path, count=20)
    assert "9 of them new" in again.about
    assert ids(again) == expected


def test_a_folder_with_another_models_vectors_is_refused(model: str, photos: Path, tmp_path: Path) -> None:
    found(model, photos, tmp_path)
    other = tmp_path / "other"
    loaded = load_model(SETTINGS)
    loaded.network.visual.proj.data += 0.01
    export_openclip(loaded, other)
    with pytest.raises(UserError, match="vectors of another model: name another folder"):
        found(str(other), photos, tmp_path)


def test_shards_are_searched_by_attribute(model: str, garments: Path, tmp_path: Path) -> None:
    said = [record for shard in sorted(garments.glob("*.tar")) for _, record in metadata_of(shard)]
    category = said[0]["category"]
    wanted = {record["product_id"] for record in said if record["category"] == category}
    result = search(
        model, str(garments), words=["dress"], count=1000, where={"category": category.upper()}, folder=tmp_path / "v"
    )
    answers = result.searches[0].answers
    assert {answer.row["product_id"] for answer in answers} == wanted
    assert len(answers) == sum(record["category"] == category for record in said)
    assert result.read(answers[0].row)[:2] == b"\xff\xd8", "the photo itself, for the page"
    with pytest.raises(UserError, match=r"no attribute heel; they have .*category"):
        search(model, str(garments), words=["dress"], where={"heel": "high"}, folder=tmp_path / "v")
    with pytest.raises(UserError, match=rf"no photo has that category; the most frequent are .*{category}"):
        search(model, str(garments), words=["dress"], where={"category": "Boats"}, folder=tmp_path / "v")


def test_the_search_in_chunks_is_exact(model: str, garments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[str]:
        return [
            answer.row["id"]
            for answer in search(model, str(garments), words=["dress"], count=150, folder=tmp_path / "v").searches[0].answers
        ]

    whole = answers()
    monkeypatch.setattr(nearest_module, "_ROWS_AT_A_TIME", 7)
    assert answers() == whole
    assert len(set(whole)) == 150


def test_the_command_prints_answers_and_writes_a_page(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "found.html"
    place = ["--model", model, "--images", str(photos), "--vectors", str(tmp_path / "v")]
    main(["search", *place, "<b>red</b>", "--image", str(photos / "1.png"), "--top", "3", "--html", str(page)])
    out = capsys.readouterr().out
    assert "left out, not readable: broken.jpg (not a decodable image" in out
    assert "  1. 1.000  1.png" in out
    assert "9 photos of" in out
    assert len([line for line in out.splitlines() if line[:3].strip().isdigit()]) == 6
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 7, "three answers each, and the photo asked for"
    assert "&lt;b&gt;red&lt;/b&gt;" in html
    assert "<b>" not in html


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to look for"),
        ([" "], "words to look for are empty"),
        (["dress", "--top", "0"], "--top 0 is not allowed: a number from 1 to 10,000"),
        (["dress", "--where", "red"], "--where red: NAME=VALUE expected"),
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: no such file"),
        (["dress", "--html", "no/where.html"], "--html no/where.html cannot be written"),
        (["dress", "--images", "nowhere"], "--images nowhere: no such folder"),
        (["dress", "--images", "empty"], "--images empty: no photos in it"),
        (["--image", "notes.jpg"], "--image notes.jpg: not a decodable image"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str],
    message: str,
    model: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.jpg").write_text("no photo")
    with pytest.raises(SystemExit) as ended:
        main(["search", "--model", model, "--images", str(photos), "--vectors", str(tmp_path / "v"), *more])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_photos_of_which_none_can_be_read_are_an_error(model: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 photos of .* can be read: not a decodable image"):
        found(model, tmp_path / "photos", tmp_path)


def test_what_shards_say_of_photos_is_read_whatever_it_is(tmp_path: Path) -> None:
    import io
    import tarfile

    said = {"a": {"brand": "x"}, "b": ["no", "object"], "c.d": {"deep": {"er": 1}}}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, value in said.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"{key}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("e.json")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"{]}"))
    assert dict(metadata_of(tmp_path / "x.tar")) == {"a": {"brand": "x"}}
