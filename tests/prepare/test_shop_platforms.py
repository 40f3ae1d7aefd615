"""Exports of shops' platforms and public data sets, prepared without a flag."""

import tarfile
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import features

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare import PrepareReport
from fashionclip_tune.prepare.columns import USUAL_NAMES
from tests.support.shops import NUM, Shop, jpeg


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def columns(report: PrepareReport) -> dict[str, str | None]:
    return {purpose: choice.name for purpose, choice in report.columns.items()}


def test_shopify(shop: Shop) -> None:
    lines = ["Handle,Title,Body (HTML),Vendor,Type,Variant SKU,Image Src,Image Position"]
    for i in range(NUM):
        for view in range(3):
            shop.photo(f"bag-{i}_{view}.jpg")
        address = f"https://cdn.shopify.com/s/files/1/02/products/bag-{i}_{{}}.jpg?v=15{i}"
        lines += [
            f'bag-{i},Bag No {i},"<p>Soft &amp; <b>large</b></p>",Own,Bags,S{i}-0,{address.format(0)},1',
            f"bag-{i},,,,,S{i}-1,{address.format(1)},2",
            f"bag-{i},,,,,,{address.format(2)},3",
            f"bag-{i},,,,,S{i}-3,,",
        ]
    report = shop.prepare("\n".join(lines))
    assert columns(report) == {
        **{"image": "Image Src", "caption": "Title", "id": "Handle", "category": "Type", "split": None, "group": None},
    }
    assert not report.dropped
    assert {product: len(keys) for product, keys in shop.products().items()} == {f"bag-{i}": 3 for i in range(NUM)}
    assert all(captions == [f"Bag No {product[4:]}"] for product, captions, _ in shop.samples().values())
    text = str(report)
    assert f"photos found by the name of the file alone: {3 * NUM}" in text
    assert f"photos whose row has no caption, and which have that of their product's first row: {2 * NUM}" in text
    assert f"rows without photo and caption, of products that have both in other rows: {NUM}" in text
    assert "guessed columns are changed by --image-column, --caption-column, --id-column, --category-column" in text


def test_html_is_taken_out_of_captions_and_counted(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i},<p>Soft &amp;&nbsp;<b>large</b></p><ul><li>5 < 6</li></ul>" for i in range(NUM)]
    report = shop.prepare("image,title,Body (HTML)\n" + "\n".join(rows), captions=("{title}: {Body (HTML)}",))
    assert shop.samples()["7"][1] == ["Bag 7: Soft & large 5 < 6"]
    assert f"captions with HTML, which was taken out: {NUM} " in str(report)


def test_woocommerce(shop: Shop) -> None:
    lines = ["ID,Type,SKU,Name,Published,Description,Categories,Images,Parent,Meta: _colour"]
    for i in range(NUM):
        names = [shop.photo(f"g{i}-{view}.jpg") for view in range(2)]
        lines.append(f'{100 + i},variable,W{i},Skirt No {i},1,Soft,Women > Skirts,"{", ".join(names)}",,red')
    report = shop.prepare("\n".join(lines), captions=("{Name}, {Meta: _colour}",))
    assert columns(report)["image"] == "Images"
    assert columns(report)["id"] == "ID"
    assert columns(report)["category"] == "Categories"
    assert {len(keys) for keys in shop.products().values()} == {2}
    assert shop.samples()["g3-1"][1] == ["Skirt No 3, red"]


def test_h_and_m_with_zeros_and_without(shop: Shop) -> None:
    for i in range(NUM):
        shop.photo(f"0{10 + i % 3}/0{10 + i % 3}8775{i:03d}.jpg")
    rows = [f"0{10 + i % 3}8775{i:03d},00{i // 2:05d},Vest,Vest top,Jersey top no {i}" for i in range(NUM)]
    header = "article_id,product_code,prod_name,product_type_name,detail_desc\n"
    report = shop.prepare(header + "\n".join(rows))
    assert columns(report) == {
        "image": "article_id",
        "caption": "detail_desc",
        "id": "article_id",
        "category": "product_type_name",
        "split": None,
        "group": "product_code",
    }
    assert len(shop.samples()) == NUM
    lost = [row[1:] for row in rows]  # what a spreadsheet makes of them
    report = shop.prepare(header + "\n".join(lost), out=shop.folder / "lost")
    assert f"photos found by their number without leading zeros: {NUM} (such as '10877500" in str(report)
    assert report.splits["train"].samples + report.splits["valid"].samples + report.splits["test"].samples == NUM


def test_kaggles_styles_and_a_comma_too_many(shop: Shop) -> None:
    for i in range(NUM):
        shop.photo(f"{2000 + i}.jpg")
    rows = [f"{2000 + i},Men,Apparel,Topwear,Tshirts,Blue,Fall,2011,Casual,Shirt No {i}" for i in range(NUM)]
    rows[3] += ", with a pocket"
    report = shop.prepare(
        "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName\n" + "\n".join(rows)
    )
    assert columns(report)["image"] == columns(report)["id"] == "id"
    assert columns(report)["caption"] == "productDisplayName"
    assert columns(report)["category"] == "articleType"
    assert dict(report.dropped) == {
        "more cells than the header's 10": ((5, "2003,Men,Apparel,Topwear,Tshirts,Blue,Fall,2011,Casual,Sh..."),)
    }
    assert "2003" not in shop.samples()


@pytest.mark.parametrize("with_ids", [False, True])
def test_one_row_a_caption(shop: Shop, with_ids: bool) -> None:
    for i in range(NUM):
        shop.photo(f"{i}.jpg")
    rows = [
        f"{i}.jpg,caption {number} of {i}" + (f",{i * 5 + number}" if with_ids else "")
        for i in range(NUM)
        for number in range(5)
    ]
    report = shop.prepare("image,caption" + ",id" * with_ids + "\n" + "\n".join(rows))
    assert {key: captions for key, (_, captions, _) in shop.samples().items()} == {
        str(i): [f"caption {number} of {i}" for number in range(5)] for i in range(NUM)
    }
    assert columns(report)["id"] is None
    assert f"rows of a photo that an earlier row has: {4 * NUM}; each photo has all its captions" in str(report)
    assert ("column id has several values for most photos, so it is no product" in str(report)) == with_ids
    assert report.num_photos == NUM


def test_captions_in_a_parquet_list_are_captions_each(shop: Shop) -> None:
    shop.table = shop.folder / "a.parquet"
    texts = [[f"a bag {i}", "", f"bag | {i}"] for i in range(NUM)]
    table = pyarrow.table({"file_name": [shop.photo(f"{i}.jpg") for i in range(NUM)], "caption": texts})
    pyarrow.parquet.write_table(table, shop.table)
    shop.prepare()
    assert shop.samples()["4"][1] == ["a bag 4", "bag | 4"]


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_photos_inside_a_parquet_file(shop: Shop, kind: str) -> None:
    photos: list[Any] = [jpeg(i) for i in range(NUM)]
    photos[3], photos[5] = b"<html>not found</html>", None
    if kind == "struct":
        photos = [None if photo is None else {"bytes": photo, "path": f"{i}.jpg"} for i, photo in enumerate(photos)]
    shop.table = shop.folder / "train-00000.parquet"
    table = pyarrow.table({"image": photos, "productDisplayName": [f"Bag {i}" for i in range(NUM)], "id": list(range(NUM))})
    pyarrow.parquet.write_table(table, shop.table, row_group_size=7)
    report = shop.prepare(images=None, workers=2)
    assert columns(report)["image"] == "image"
    assert dict(report.dropped) == {
        "image file is a web page or a drawing (HTML, XML or SVG)": ((3, "train-00000_3"),),
        "image missing": ((5, "train-00000_5"),),
    }
    samples = shop.samples()
    assert len(samples) == NUM - 2
    for shard in shop.out.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith("jpg"):
                    number = int(member.name.split(".")[0].rpartition("_")[2])
                    content = tar.extractfile(member)
                    assert content is not None
                    assert content.read() == jpeg(number)
                    assert samples[member.name.split(".")[0]][:2] == (str(number), [f"Bag {number}"])


LANGUAGES = {
    "German": "Bilddatei;Artikelbezeichnung;Artikel-Nr.;Warengruppe",
    "French": "Fichier image;Nom du produit;Référence;Catégorie",
    "Spanish": "Imagen;Nombre del producto;Código;Categoría",
    "Italian": "Immagine;Nome prodotto;Codice articolo;Categoria",
    "Akeneo": "image;name-en_US;sku;family",
    "Google": "image link;title;id;google product category",
    "DeepFashion": "image_name;description;item_id;category",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_columns_by_other_names(shop: Shop, language: str) -> None:
    header = LANGUAGES[language]
    rows = [f"{shop.photo(f'{i}.jpg')};Été {i};P{i // 2};Kleider" for i in range(NUM)]
    report = shop.prepare(header + "\n" + "\n".join(rows))
    names = [columns(report)[purpose] for purpose in ("image", "caption", "id", "category")]
    assert names == header.split(";")
    assert {len(keys) for keys in shop.products().values()} == {2}
    assert "items.csv: separated by semicolon (guessed: --separator)" in report.notes


def test_of_two_ids_the_one_that_brings_photos_together(shop: Shop) -> None:
    rows = [f"{i},{shop.photo(f'{i}.jpg')},Bag {i},P{i // 4}" for i in range(NUM)]
    report = shop.prepare("id,image,title,item_id\n" + "\n".join(rows))
    assert columns(report)["id"] == "item_id"
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for product, _, split in shop.samples().values():
        homes[product].add(split)
    assert {len(splits) for splits in homes.values()} == {1}
    report = shop.prepare(out=shop.folder / "chosen", id_column="id")
    assert columns(report)["id"] == "id"
    report = shop.prepare(out=shop.folder / "none", id_column="none", category_column="none")
    assert columns(report)["id"] is None
    with pytest.raises(UserError, match="--caption-column none: a caption is needed"):
        shop.prepare(out=shop.folder / "no", caption_column="none")


def test_a_column_called_split_that_is_none(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i},side slit" for i in range(NUM)]
    report = shop.prepare("image,title,split\n" + "\n".join(rows))
    assert report.splits_from is None
    assert "splits: column split holds none (such as 'side slit'), so they are drawn" in report.notes


NAMES = {
    "upper suffix": ("7.JPG", "7"),
    "gif": ("7.GIF", "7"),
    "another case": ("Dress_7.jpeg", "dress_7.JPEG"),
    "dots": ("12.345.jpg", "12.345"),
    "Windows": ("sub/7.jpg", r"sub\7.jpg"),
    "percent": ("a b+c.jpg", "a%20b%2Bc.jpg"),
    "percent itself": ("50%25.jpg", "50%25.jpg"),
    "the folder's name": ("7.jpg", "images/7.jpg"),
    "the folder's name and more": ("sub/7.jpg", "data/images/sub/7.jpg"),
    "decomposed": (unicodedata.normalize("NFD", "robe décolletée.jpg"), unicodedata.normalize("NFC", "robe décolletée.jpg")),
    "composed": (unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.jpg")),
    "address": ("7.jpg", "https://cdn.example.com/x/y/7.jpg?width=300&v=1"),
    "deeper": ("010/0108775015.jpg", "0108775015"),
    "without zeros": ("010/0108775015.jpg", "108775015"),
    "dot first": ("sub/7.jpg", "./sub/7.jpg"),
    "comma": ("a, b.jpg", '"a, b.jpg"'),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_as_tables_have_them(shop: Shop, kind: str) -> None:
    file, cell = NAMES[kind]
    shop.photo(file, "GIF" if file.endswith("GIF") else "JPEG")
    others = [f"{shop.photo(f'other{i}.jpg')},Bag {i}" for i in range(NUM)]
    report = shop.prepare("image,title\n" + f"{cell},The one\n" + "\n".join(others))
    assert not report.dropped
    assert ["The one"] in [captions for _, captions, _ in shop.samples().values()]


def test_an_absolute_path_counts_inside_the_folder_only(shop: Shop) -> None:
    rows = [f"{shop.images / shop.photo(f'{i}.jpg')},Bag {i}" for i in range(NUM)]
    (shop.folder / "secret.jpg").write_bytes(jpeg(0))
    rows += [
        f"{shop.folder / 'secret.jpg'},Bag",
        f"{shop.images}/../secret.jpg,Bag",
        r"C:\photos\0.jpg,Bag",
        "file:///etc/0.jpg,Bag",
    ]
    report = shop.prepare("image,title\n" + "\n".join(rows))
    assert {reason: len(lost) for reason, lost in report.dropped.items()} == {"image outside the folder": 4}
    assert len(shop.samples()) == NUM


def test_a_file_that_several_names_might_mean_is_nobodys(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i}" for i in range(NUM)]
    shop.photo("a.jpg")
    shop.photo("one/b.jpg")
    shop.photo("two/b.jpg")
    shop.photo("c.jpg")
    rows += ["https://x.example/1/a.jpg,Bag", "https://x.example/2/a.jpg,Bag"]  # two photos, of which one is here
    rows += ["b,Bag"]
    rows += ["c.jpg,Bag", "https://x.example/3/c.jpg,Bag"]
    report = shop.prepare("image,title\n" + "\n".join(rows))
    assert [number for number, _ in report.dropped["image name fits several files"]] == [26, 27, 28, 30]
    assert len(shop.samples()) == NUM + 1


@pytest.mark.parametrize(
    "cell", ['"[""a.jpg"", ""b.jpg""]"', "\"['a.jpg', 'b.jpg']\"", '"a.jpg\nb.jpg"', '"a.jpg,b.jpg"', "a.jpg|b.jpg"]
)
def test_several_photos_in_a_cell(shop: Shop, cell: str) -> None:
    shop.photo("a.jpg")
    shop.photo("b.jpg")
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i}" for i in range(NUM)]
    report = shop.prepare("image,title\n" + f"{cell},Two\n" + "\n".join(rows))
    assert not report.dropped
    assert sum(captions == ["Two"] for _, captions, _ in shop.samples().values()) == 2


def test_what_is_no_photo_is_called_by_its_name(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.jpg')},Bag {i}" for i in range(NUM)]
    for name, content in {
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "film.jpg": b"\0\0\0\x18ftypheic" + bytes(40),
        "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\n",
        "odd.jpg": b"odd",
    }.items():
        (shop.images / name).write_bytes(content)
        rows.append(f"{name},Bag")
    report = shop.prepare("image,title\n" + "\n".join(rows))
    said = {file: reason for reason, lost in report.dropped.items() for _, file in lost}
    for name, word in {"empty": "empty", "page": "web page", "film": "HEIC", "lfs": "Git LFS", "odd": "decoded"}.items():
        assert word in said[f"{name}.jpg"]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_under_any_name(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.{suffix}', 'AVIF')},Bag {i}" for i in range(NUM) for suffix in ("jpg", "avif")]
    assert not shop.prepare("image,title\n" + "\n".join(rows)).dropped
    assert len(shop.samples()) == 2 * NUM


@pytest.mark.parametrize("separator", [",", ", "])
def test_several_addresses_in_a_cell(shop: Shop, separator: str) -> None:
    rows = []
    for i in range(NUM):
        names = [shop.photo(f"w{i}-{view}.jpg") for view in range(3)]
        rows.append(f'{i},Dress {i},"{separator.join(f"https://s.example/up/{name}?w=8&h=9" for name in names)}"')
    report = shop.prepare("ID,Name,Images\n" + "\n".join(rows))
    assert {product: len(keys) for product, keys in shop.products().items()} == {str(i): 3 for i in range(NUM)}
    assert f"photos found by the name of the file alone: {3 * NUM} " in str(report)


def test_further_columns_of_photos_are_found_and_thumbnails_and_numbers_are_not(shop: Shop) -> None:
    for i in range(NUM):
        shop.photo(f"{i}.jpg")  # which the number of a row would name
        shop.photo(f"thumbs/a{i}.jpg")
        shop.photo(f"w/s/a{i}.jpg")
        shop.photo(f"w/s/b{i}.jpg")
    rows = [f"{i},Dress {i},/w/s/a{i}.jpg,thumbs/a{i}.jpg,/w/s/b{i}.jpg" for i in range(NUM)]
    report = shop.prepare("sku,name,base_image,thumbnail_image,additional_images\n" + "\n".join(rows))
    assert report.columns["image"].names == ("base_image", "additional_images")
    assert {key[0] for key in shop.samples()} == {"a", "b"}
    assert len(shop.samples()) == 2 * NUM
    assert f"photos in --images that no row names: {2 * NUM} (such as 0.jpg)" in report.notes


def test_addresses_that_differ_in_their_folders(shop: Shop) -> None:
    rows = [f"{i},Dress {i},https://c.example/p/{shop.photo(f'{i:03d}/main.jpg')}" for i in range(NUM)]
    report = shop.prepare("id,title,image_url\n" + "\n".join(rows))
    assert not report.dropped
    assert {product: captions for product, captions, _ in shop.samples().values()} == {
        str(i): [f"Dress {i}"] for i in range(NUM)
    }


def test_merged_cells_are_filled_from_the_row_above(shop: Shop) -> None:
    rows = []
    for i in range(NUM):
        rows += [f"{i:04d};Vestido {i};{shop.photo(f'{i}a.jpg')};Vestidos", f";;{shop.photo(f'{i}b.jpg')};"]
    shop.prepare("Código;Nombre;Foto;Categoría\n" + "\n".join(rows))
    assert shop.products() == {f"{i:04d}": {f"{i}a", f"{i}b"} for i in range(NUM)}
    assert shop.samples()["7b"][1] == ["Vestido 7"]


def test_a_title_above_the_header(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.jpg')},Dress {i},P{i}" for i in range(NUM)]
    report = shop.prepare("Price list 2024\n\nPhoto,Product name,SKU\n" + "\n".join(rows))
    assert "items.csv: its header is row 3; above it are 'Price list 2024'" in report.notes
    assert len(shop.samples()) == NUM


def test_rows_that_do_not_fit_are_refused_before_columns_are_guessed(shop: Shop) -> None:
    rows = [f"{shop.photo(f'{i}.jpg')},Dress {i}, 19,90" for i in range(NUM)]
    with pytest.raises(UserError, match=r"24 of 24 rows of .* such as row 2, which has more cells than the header's 3"):
        shop.prepare("photo,name,price\n" + "\n".join(rows))


def test_few_products_are_in_both_splits(shop: Shop) -> None:
    for count in (2, 3, 8):
        (shop.folder / str(count)).mkdir()
        small = Shop(shop.folder / str(count))
        rows = [f"{small.photo(f'{i}.jpg')},Dress {i}" for i in range(count)]
        report = small.prepare("image,title\n" + "\n".join(rows), valid_share=0.1)
        assert report.splits["train"].samples
        assert report.splits["valid"].samples


def test_a_photo_that_stands_for_a_missing_one_does_not_undo_the_products(shop: Shop) -> None:
    shop.photo("noimage.jpg")
    rows = [f"P{i // 2},{'noimage.jpg' if i < 6 else shop.photo(f'{i}.jpg')},Bag {i}" for i in range(2 * NUM)]
    report = shop.prepare("id,image,title\n" + "\n".join(rows))
    assert columns(report)["id"] == "id"
    assert {product for product, keys in shop.products().items() if len(keys) == 2} == {f"P{i}" for i in range(3, NUM)}


def test_usual_names_are_names() -> None:
    assert {name for names in USUAL_NAMES.values() for name in names if len(name) < 3} == {"id"}
