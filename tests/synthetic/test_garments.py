"""The garments of the synthetic data set: what is drawn at random, what it looks like and what is said of it."""

from random import Random

import pytest

from fashionclip_tune.synthetic.captions import write_captions
from fashionclip_tune.synthetic.drawing import garment_images
from fashionclip_tune.synthetic.garments import KINDS, random_garment


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_every_attribute_can_be_drawn(kind: str) -> None:
    rngs = (Random(f"{kind}/{number}") for number in range(10_000))
    of_kind = (g for rng in rngs if (g := random_garment(rng, "sweep")).kind == kind)
    table = KINDS[kind]
    wanted = {*table.hems, *table.cuts, *table.sleeves, *table.necklines, *table.closures, *table.details}
    for garment in of_kind:
        new = {garment.length, garment.cut, garment.sleeve, garment.neckline, garment.closure, garment.detail} & wanted
        if new:
            cloth, mask = garment_images(garment, Random(0), 64)
            assert cloth.size == mask.size == (64, 64)
            # It fills a fair part of the photo and its edges stay inside.
            assert 0.08 < sum(mask.histogram()[128:]) / 64**2 < 0.7
            wanted -= new
        if not wanted:
            return
    pytest.fail(f"never drawn: {wanted}")


def test_pretraining_draws_a_part_of_what_sweep_draws_and_has_its_own_words() -> None:
    drawn = [random_garment(Random(number), "pretraining") for number in range(500)]
    assert {g.kind for g in drawn} < set(KINDS)
    assert {g.pattern for g in drawn} == {"plain", "striped", "checked", "polka dot"}
    words = " ".join(text for g in drawn for text in write_captions(Random(0), g, "pretraining"))
    assert all(word in words for word in ("tee", "button-up", "jumper", "pants", "plaid", "dotted", "coat"))
    assert not any(word in words for word in ("t-shirt", "sweater", "trousers", "checked", "polka dot", "collar"))


def test_titles_are_shop_like_and_most_are_distinct() -> None:
    titles, whole_captions = [], 0
    for number in range(1_000):
        garment = random_garment(Random(number), "sweep")
        captions = write_captions(Random(number), garment, "sweep")
        titles.append(captions[0])
        whole_captions += all("  " not in text and text == text.strip() and "{" not in text for text in captions)
    assert whole_captions == len(titles)
    assert all(title.startswith(("Women ", "Men ")) for title in titles)
    assert len(set(titles)) > 900
