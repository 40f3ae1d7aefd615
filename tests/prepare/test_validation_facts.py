"""What a validation split can tell: ceilings beside the evaluation itself, chance, intervals, and its protocol."""

import json
from pathlib import Path

import pytest
import torch

from fashionclip_tune.config.choices import RetrievalProtocol
from fashionclip_tune.data.shards import find_dataset
from fashionclip_tune.errors import UserError
from fashionclip_tune.evaluation.evaluate import describe
from fashionclip_tune.evaluation.protocols import Pool
from fashionclip_tune.prepare.data_report import report_on
from fashionclip_tune.prepare.validation_facts import validation_facts
from tests.support.reported_photos import photo
from tests.support.shops import NUM, Shop


def test_the_ceiling_is_what_a_model_without_mistakes_scores() -> None:
    sizes = (14, 1, 1, 3, 1)  # photos of each caption
    captions = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    eye = torch.eye(len(sizes))
    pool = Pool(
        images_ND=eye[captions],
        captions_VD=eye,
        caption_rows_NK=captions[:, None],
        products_N=torch.arange(len(captions)),
        categories_N=torch.full((len(captions),), -1),
        is_query_N=torch.ones(len(captions), dtype=torch.bool),
    )
    scores = describe(pool, RetrievalProtocol.INSTANCE)[0]
    facts = validation_facts([f"Caption {number}" for number in captions], [str(i) for i in range(len(captions))])
    assert facts.ceiling_at_1 == pytest.approx(scores["recall_at_1"])
    assert facts.ceiling_at_10 == pytest.approx(scores["recall_at_10"])
    assert (facts.photos, facts.products, facts.shared_captions) == (20, 20, 17)
    assert facts.chance_at_10 == 0.5


def test_few_products_are_warned_of() -> None:
    few = validation_facts([f"c{i}" for i in range(200)], [str(i // 2) for i in range(200)])
    assert "validation: 200 photos of 100 products; a random order has a Recall@10 of 0.050" in few.lines()
    assert any(
        "fewer than 300 products: a 95 % interval of Recall@10 is some 0.10 to either side" in line for line in few.lines()
    )
    enough = validation_facts([f"c{i}" for i in range(300)], [str(i) for i in range(300)])
    assert len(enough.lines()) == 1


def test_captions_in_a_broken_encoding_are_counted() -> None:
    captions = ("GrÃ¶ÃŸe 36", "Größe 36", "Robe dÃ©colletÃ©e", "Caf\ufffd noir", "Ärmel", "Crème brûlée™")
    report = report_on([photo(i, captions=(caption,)) for i, caption in enumerate(captions)])
    assert {"GrÃ¶ÃŸe 36", "Robe dÃ©colletÃ©e", "Caf\ufffd noir"} <= set(report.broken_encoding.examples)
    assert any("in a broken encoding: 3 ('GrÃ¶ÃŸe 36'" in line for line in report.lines())


def test_the_template_that_is_too_long_is_named(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i},{'word ' * (90 if i % 4 == 0 else 5)}{i}" for i in range(NUM)]
    report = shop.prepare("image,title,story\n" + "\n".join(rows), captions=("{title}", "{title}. {story}"))
    assert report.data.too_long_of_template == {"{title}. {story}": 0.25}
    assert "  of '{title}. {story}': 25%" in report.lines()


def test_where_products_have_several_photos_the_data_set_asks_for_their_protocol(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i},P{i // 3}" for i in range(2 * NUM)]
    report = shop.prepare("image,title,id\n" + "\n".join(rows))
    assert find_dataset(shop.out).protocol == "product"
    assert any("a sweep takes the protocol that counts them together, product, unless told" in line for line in report.lines())
    described = json.loads((shop.out / "dataset.json").read_text())
    (shop.out / "dataset.json").write_text(json.dumps(described | {"protocol": "precision"}))
    with pytest.raises(UserError, match=r"dataset.json names a protocol that there is not, 'precision'"):
        find_dataset(shop.out)
    single = Shop(tmp_path_of(tmp_path, "single"))
    single.prepare("image,title,id\n" + "\n".join(f"{single.photo(f'{i}.jpg')},Bag {i},P{i}" for i in range(NUM)))
    assert find_dataset(single.out).protocol is None


def tmp_path_of(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_other_columns_that_may_be_the_product_are_warned_of(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i},P{i // 2},R{i % 6}" for i in range(2 * NUM)]
    report = shop.prepare("image,title,product_id,style_id\n" + "\n".join(rows))
    assert any(
        note.startswith("warning: if style_id is the product, 6 of its 6 products are in several splits")
        for note in report.notes
    )
