"""Splits: as a column says, or drawn so that nothing is in two of them."""

import random

import pytest

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.splits import Tie, count_leaking_products, drawn_splits, given_splits, refuse_if_empty


def random_rows(seed: int, *, products: int) -> list[list[Tie]]:
    rng = random.Random(seed)
    rows: list[list[Tie]] = []
    for _ in range(200):
        rows.append([("product", str(rng.randrange(products)))])
        rows[-1] += [(kind, str(rng.randrange(300))) for kind in ("group", "caption") if rng.random() < 0.5]
    return rows


def draw(rows: list[list[Tie]], seed: int = 0) -> list[str]:
    return drawn_splits(rows, valid_share=0.2, test_share=0.2, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_share_a_tie_are_in_one_split_whatever_their_order(seed: int) -> None:
    rows = random_rows(seed, products=180)
    splits = draw(rows, seed)
    assert count_leaking_products(rows, splits) == 0
    assert draw(rows[::-1], seed) == splits[::-1]


def test_ties_join_rows_through_others() -> None:
    chain = [[("product", str(i)), ("caption", f"c{i}"), ("caption", f"c{i + 1}")] for i in range(50)]
    assert len(set(draw(chain))) == 1
    # A group and a caption of the same name are not the same thing.
    apart: list[list[Tie]] = [[("product", str(i)), ("caption" if i % 2 else "group", str(i // 2))] for i in range(50)]
    assert len(set(draw(apart))) == 3


def test_shares_are_about_right_and_depend_on_the_seed() -> None:
    rows: list[list[Tie]] = [[("product", str(i))] for i in range(2_000)]
    splits = draw(rows)
    assert 340 < splits.count("valid") < 460
    assert 340 < splits.count("test") < 460
    assert draw(rows, seed=1) != splits
    assert set(drawn_splits(rows, valid_share=0.2, test_share=0, seed=0)) == {"train", "valid"}


def test_given_splits_have_several_spellings() -> None:
    values = ["Train", "training", "VALID", "val", "validation", "dev", "test"]
    assert given_splits(enumerate(values), column="part") == ["train"] * 2 + ["valid"] * 4 + ["test"]
    with pytest.raises(UserError, match=r"column part, row 7: 'tset' is not a split; allowed are train, training, test"):
        given_splits([(6, "test"), (7, "tset")], column="part")


def test_leaks_are_counted_by_product() -> None:
    rows: list[list[Tie]] = [
        [("product", "a")],
        [("product", "a")],
        [("product", "b"), ("group", "g")],
        [("product", "c"), ("group", "g")],
        [("product", "d"), ("group", "h")],
        [("product", "d"), ("group", "h")],
    ]
    assert count_leaking_products(rows, ["train", "test", "train", "valid", "train", "train"]) == 3


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_train_and_valid_are_needed(missing: str) -> None:
    refuse_if_empty(["valid", "train"], "advice")
    with pytest.raises(UserError, match=f"in the {missing} split, .*: advice"):
        refuse_if_empty([split for split in ("train", "valid", "test") if split != missing], "advice")
