"""The report on the data: what it counts, what it finds, what it leaves alone; searches against slow ones."""

import time

import numpy as np
import pytest
from PIL import Image

from fashionclip_tune.prepare.data_report import report_on, token_counts
from fashionclip_tune.prepare.languages import RULE, foreign_captions, looks_foreign
from fashionclip_tune.prepare.lookalikes import (
    MAX_COLOUR_DIFFERENCE,
    MAX_DIFFERENT_BITS,
    count_same,
    same_across_splits,
    similar_across_splits,
)
from fashionclip_tune.prepare.photo_encoding import ImageHashes, image_hashes
from tests.support.reported_photos import as_jpeg, photo, product_photo


def test_the_same_photo_is_found_whatever_the_file() -> None:
    jpeg = as_jpeg(product_photo(0))
    with_comment = jpeg[:2] + b"\xff\xfe\x00\x05abc" + jpeg[2:]  # another file, the same pixels
    hashes = [image_hashes(data) for data in (jpeg, as_jpeg(product_photo(1)), with_comment, jpeg)]
    assert count_same(hashes) == 2
    found = same_across_splits(hashes, [0, 0, 1, 2], range(len(hashes)))
    assert (found.photos, found.examples) == (2, ((0, 2), (0, 3)))
    assert same_across_splits(hashes, [1, 0, 1, 1], range(len(hashes))).photos == 0
    assert same_across_splits(hashes, [2, 0, 1, 1], range(len(hashes))).examples == ((2, 0),)
    assert similar_across_splits(hashes, [0, 0, 1, 2], range(len(hashes))).photos == 0


def test_nearly_the_same_photos_are_found_and_others_are_not() -> None:
    width, height = 120, 160
    originals = [product_photo(seed) for seed in range(60)]
    found = {"quality": 0, "smaller": 0, "larger": 0, "cropped": 0}
    for image in originals:
        copies = {
            "quality": as_jpeg(image, 50),
            "smaller": as_jpeg(image.resize((width * 2 // 3, height * 2 // 3), Image.Resampling.LANCZOS)),
            "larger": as_jpeg(image.resize((width * 2, height * 2), Image.Resampling.BICUBIC)),
            "cropped": as_jpeg(image.crop((1, 1, width - 1, height - 1))),
        }
        for how, copy in copies.items():
            found[how] += similar_across_splits([image_hashes(as_jpeg(image)), image_hashes(copy)], [0, 1], range(2)).photos
    assert min(found.values()) >= 54, found
    hashes = [image_hashes(as_jpeg(image)) for image in originals]
    assert similar_across_splits(hashes, [seed % 3 for seed in range(60)], range(len(hashes))).photos <= 1


def test_another_colour_is_another_photo() -> None:
    image = product_photo(3)
    red, green, blue = image.split()
    hashes = [image_hashes(as_jpeg(image)), image_hashes(as_jpeg(Image.merge("RGB", (blue, red, green))))]
    assert similar_across_splits(hashes, [0, 1], range(len(hashes))).photos == 0


@pytest.mark.parametrize("seed", range(4))
def test_similar_photos_equal_a_search_of_each_with_each(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bases = rng.integers(0, 256, (6, 192))
    hashes: list[ImageHashes] = []
    for _ in range(160):
        which = rng.integers(6)
        bits = int(which) * 0x0123456789ABCDEF & (2**64 - 1)
        for bit in rng.integers(0, 64, rng.integers(0, 6)):
            bits ^= 1 << int(bit)
        noise = rng.integers(-9, 10, 192) * rng.random()
        thumbnail = np.clip(bases[which] + noise, 0, 255).astype(np.uint8).tobytes()
        hashes.append(ImageHashes(pixels=int(rng.integers(150)), gradients=bits, thumbnail=thumbnail))
    splits = rng.integers(0, 3, 160).tolist()

    def alike(a: ImageHashes, b: ImageHashes) -> bool:
        left, right = (np.frombuffer(x.thumbnail, np.uint8).astype(float).reshape(64, 3) for x in (a, b))
        contrast = min(np.abs(x - np.median(x, axis=0)).mean() for x in (left, right))
        near = np.abs(left - right).mean() <= MAX_COLOUR_DIFFERENCE * contrast
        return bool(near) and bin(a.gradients ^ b.gradients).count("1") <= MAX_DIFFERENT_BITS and a.pixels != b.pixels

    pairs = [(i, j) for j in range(160) for i in range(160) if splits[i] < splits[j] and alike(hashes[i], hashes[j])]
    found = similar_across_splits(hashes, splits, range(len(hashes)))
    assert found.photos == len({second for _, second in pairs}) > 20
    assert set(found.examples) <= set(pairs)
    assert len(found.examples) == 3


def test_a_catalogue_of_blank_photos_takes_no_time() -> None:
    """All with one dHash."""
    hashes = [ImageHashes(number, 0, bytes([number % 200 + 20] * 191 + [255])) for number in range(6_000)]
    started = time.monotonic()
    similar_across_splits(hashes, [number % 2 for number in range(6_000)], range(len(hashes)))
    assert time.monotonic() - started < 5


def test_photos_a_product() -> None:
    report = report_on([photo(i, product=(0, 0, 0, 1, 1, 2)[i]) for i in range(6)])
    each = report.photos_per_product
    assert (each.fewest, each.median, each.most, round(each.share_with_several, 2)) == (1, 2, 3, 0.67)
    assert "photos a product: 1 to 3, median 2; 67% of the products have several" in report.lines()
    assert any("the protocol that counts them together, product, unless told" in line for line in report.lines())
    published = report_on([photo(i, product=(0, 0, 0, 1, 1, 2)[i]) for i in range(6)], notes_protocol=False)
    assert any("--set evaluation.protocol=product" in line for line in published.lines())
    single = report_on([photo(i) for i in range(3)])
    assert not any("counts them together" in line for line in single.lines())


def test_long_captions_are_counted_once_and_with_all_captions() -> None:
    fits, cut = "word " * 75, "word " * 76
    assert token_counts(["short", fits, cut]) == {fits: 77, cut: 78}
    report = report_on([photo(0, captions=("short", fits)), photo(1, captions=("short", cut)), photo(2, captions=(cut,))])
    assert (report.too_long.captions, report.longest_tokens, report.num_captions) == (1, 78, 3)
    assert "of 3 distinct captions, longer than CLIP reads (77 tokens; the longest has 78) and so cut off: 1 (" in str(
        report.lines()
    )
    assert token_counts(["色" * 30]) == {"色" * 30: pytest.approx(92, abs=30)}  # few letters, many tokens


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("Rotes Kleid mit Gürtel", "German"),
        ("Schwarze Jacke für Damen", "German"),
        ("Chemise bleue avec manches longues", "French"),
        ("Vestido rojo con mangas largas", "Spanish"),
        ("Camicia bianca senza maniche", "Italian"),
        ("Zwarte broek met riem", "Dutch"),
        ("Vestido vermelho com mangas", "Portuguese"),
        ("Sukienka damska czerwona", "Polish"),
        ("Röd klänning med ärmar", "Swedish"),
        ("Uzun kollu siyah gömlek", "Turkish"),
        ("Canapé gris", "French"),
        ("Красное платье", "not Latin script"),
        ("赤いドレス", "not Latin script"),
        ("فستان أحمر", "not Latin script"),
        ("Nike 3XL 红色连衣裙加厚款式", "not Latin script"),
        ("Red dress with long sleeves", None),
        ("Dolce & Gabbana Pour Homme eau de toilette", None),
        ("Oscar de la Renta La Robe in black", None),
        ("Womens jeans, von Dutch", None),
        ("Man die cut bag, no. 1 on a top", None),
        ("Café crème blouse, naïve", None),
        ("Peter England Men Party Blue Jeans", None),
        ("Ermenegildo Zegna cotton blazer", None),
        ("Ärmel", None),
        ("1234 !!", None),
        ("", None),
    ],
)
def test_languages(caption: str, language: str | None) -> None:
    assert looks_foreign(caption) == language


FRENCH = ["Chemise en laine noire", "Blouse en satin rouge", "Jean slim bleu", "Robe en coton blanc", "Pantalon chino beige"]
ENGLISH = ["Satin blouse red", "Slim jean blue", "Cashmere coat", "Classic green wool jersey", "Belted olive dress"]


def test_words_of_several_languages_are_judged_by_the_other_captions() -> None:
    of_shop = foreign_captions(FRENCH)
    assert of_shop == dict.fromkeys(FRENCH, "French")
    assert any(looks_foreign(caption) is None for caption in FRENCH)
    assert foreign_captions(ENGLISH) == {}
    assert foreign_captions([]) == {}


def test_foreign_captions_are_reported_with_the_rule() -> None:
    captions = ["Rotes Kleid mit Gürtel", "Blaues Kleid mit Gürtel", "Красное платье", "Red dress"]
    report = report_on([photo(i, captions=(caption,)) for i, caption in enumerate(captions)])
    assert {language: found.captions for language, found in report.foreign.items()} == {"German": 2, "not Latin script": 1}
    text = "\n".join(report.lines())
    assert (
        "of 4 distinct captions, looking non-English, which the LAION models hardly know and SigLIP2 does: 3. German 2 ("
        in text
    )
    assert RULE in text


def test_duplicates_are_warned_of_with_examples() -> None:
    image = product_photo(0)
    near = image_hashes(as_jpeg(image, 60))
    photos = [photo(0), photo(1), photo(2, "valid", hashes=image_hashes(as_jpeg(image))), photo(3, "test", hashes=near)]
    report = report_on(photos)
    text = "\n".join(report.lines())
    assert "the same as one of an earlier split, so that scores will flatter: 1 (train: 0.jpg = valid: 2.jpg)" in text
    assert "nearly the same as one of an earlier split, so that scores will flatter: 1 (train: 0.jpg ~ test: 3.jpg)" in text
    assert "the same photo again: 1 of 4 photos" in text
    assert report.as_json()["same_across_splits"] == {"photos": 1, "examples": (("train: 0.jpg", "valid: 2.jpg"),)}
    assert "none found" in "\n".join(report_on(photos[:2]).lines())
