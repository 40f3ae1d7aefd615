"""Which column serves which purpose: as the user chose, else by its name, and by what stands in it.

The names are those of Fashion-Gen, Shopify, WooCommerce, Akeneo, Google's product feed, Kaggle's styles.csv, H&M and
DeepFashion, and what shops call such columns in English, German, French, Spanish and Italian.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from fashionclip_tune.errors import UserError
from fashionclip_tune.prepare.caption_templates import CaptionTemplate, parse_template
from fashionclip_tune.prepare.options import PrepareOptions
from fashionclip_tune.prepare.photo_folder import PhotoFolder, names_photos
from fashionclip_tune.prepare.splits import SPLIT_WORDS
from fashionclip_tune.prepare.tables.tables import Tables

NO_COLUMN = "none"
# By purpose, the first that the table has, in any spelling. Fashion-Gen's names begin with input_, and its descriptions are
# what it is about; its names, and those of H&M, are too short to tell products apart.
USUAL_NAMES = {
    "image": (
        *("image", "image_path", "image_file", "image_name", "file_name", "file", "photo", "picture", "path", "image_src"),
        *("images", "image_link", "image_url", "image_urls", "image_urls_x_y_z", "main_image", "base_image", "main_image_url"),
        *("photos", "pictures", "img", "image_1", "photo_1", "picture_1", "bild", "bilddatei", "bilder", "bild_1", "foto_1"),
        *("foto", "fotos", "produktbild", "fichier", "fichier_image", "imagen", "imagenes", "archivo", "immagine", "immagini"),
    ),
    "caption": (
        *("caption", "input_description", "title", "detail_desc", "name", "product_name", "product_display_name"),
        *("prod_name", "product_title", "item_name", "post_title", "label", "text", "comment", "titel", "bezeichnung"),
        *("artikelbezeichnung", "produktbezeichnung", "produktname", "artikelname", "titre", "nom", "nom_du_produit"),
        *("nom_produit", "libelle", "designation", "titulo", "nombre", "nombre_del_producto", "nombre_producto"),
        *("titolo", "nome", "nome_prodotto", "denominazione", "description", "beschreibung", "descripcion", "descrizione"),
        "input_name",
    ),
    "id": (
        *("product_id", "handle", "item_id", "article_id", "id", "sku", "style_id", "input_product_id", "identifier"),
        *("artikelnummer", "artikel_nr", "art_nr", "artikel_id", "produktnummer", "produkt_id", "reference", "ref"),
        *("id_produit", "reference_produit", "referencia", "codigo", "id_producto", "codice", "codice_articolo", "id_prodotto"),
        *("riferimento", "style_no", "style_number", "style_code", "item_sku", "item_no", "item_number", "article_no"),
        *("article_number", "product_no", "product_number", "gtin", "ean"),
    ),
    "category": (
        *("category", "product_category", "categories", "article_type", "product_type", "product_type_name"),
        *("google_product_category", "kategorie", "kategorien", "warengruppe", "categorie", "categoria", "categorias"),
        *("family", "type", "input_category"),
    ),
    "split": ("split", "subset", "partition"),
    "group": ("group_id", "group", "item_group_id", "product_code", "parent", "parent_sku", "family_id"),
}
_LANGUAGE = r"-([a-z]{2}_[A-Z]{2})(?:-\w+)?"
_THUMBNAILS = ("thumb", "small", "swatch", "icon", "logo")
_MANY = 0.1  # of the rows
_SAMPLED = 200  # rows, by which a column counts as one of photos


@dataclass(frozen=True)
class ColumnChoice:
    """The columns that serve a purpose (none: the table has none; several: photos), and whether the name was guessed."""

    names: tuple[str, ...]
    guessed: bool

    @property
    def name(self) -> str | None:
        return " and ".join(self.names) or None

    def __str__(self) -> str:
        return f"{self.name}{' (guessed)' if self.guessed else ''}" if self.names else "none"


NOT_THERE = ColumnChoice((), guessed=False)


def choose_column(purpose: str, chosen: Sequence[str], tables: Tables) -> ColumnChoice:
    """The column that the user chose, or the one whose name is usual; none where the user says ``none``.

    Raises:
        UserError: a chosen column does not exist, or none is usual where one is needed.
    """
    if tuple(chosen) == (NO_COLUMN,) and NO_COLUMN not in tables.columns:
        if purpose in ("image", "caption"):
            raise UserError(f"--{purpose}-column none: a {purpose} is needed; {_columns_of(tables)}")
        return NOT_THERE
    for name in chosen:
        if name not in (*tables.columns, *tables.photo_columns):
            of = " and ".join(path.name for path in tables.paths)
            raise UserError(f"--{purpose}-column {name}: there is no such column in {of}; {_columns_of(tables)}")
    if chosen:
        return ColumnChoice(tuple(chosen), guessed=False)
    if usual := usual_columns(purpose, tables):
        return ColumnChoice((usual[0],), guessed=True)
    if purpose == "caption":
        raise _none_looks_like("caption", ": choose it with --caption-column or write it with --caption", tables)
    return NOT_THERE


def usual_columns(purpose: str, tables: Tables) -> list[str]:
    """Those of a usual name, the most usual first; of one in several languages that in English."""
    spellings: dict[str, str] = {}
    for column in sorted(tables.columns, key=lambda name: _language(name)[:2] not in ("", "en")):
        spellings.setdefault(_letters(column), column)
    return [spellings[letters] for usual in USUAL_NAMES[purpose] if (letters := _letters(usual)) in spellings]


def _other_languages(choice: ColumnChoice, tables: Tables) -> list[str]:
    if not choice.guessed or not (language := _language(choice.names[0])):
        return []
    same = (name for name in tables.columns if _letters(name) == _letters(choice.names[0]))
    others = sorted({_language(name) for name in same} - {language, ""})
    if not others:
        return []
    return [f"captions are those in {language}; there are others in {', '.join(others)} (guessed: --caption-column)"]


def choose_images(chosen: Sequence[str], tables: Tables, folder: PhotoFolder | None) -> ColumnChoice:
    """The columns of photos: those chosen; one that holds the photos; the usual one; or the one whose cells are names of files.

    Raises:
        UserError: there is none.
    """
    if chosen:
        return choose_column("image", chosen, tables)
    if tables.photo_columns:
        return ColumnChoice(tables.photo_columns[:1], guessed=not tables.is_hdf5)
    usual = usual_columns("image", tables)
    if folder is None:
        return ColumnChoice(tuple(usual[:1]), guessed=True)
    shares = {column: _share_found(column, tables, folder) for column in usual}
    if not any(shares.values()):
        shares |= {column: _share_found(column, tables, folder) for column in tables.columns}
    best = max(shares, key=lambda column: shares[column], default="")  # of equal ones the most usual
    if not usual and shares.get(best, 0.0) < 0.5:
        advice = ", and no column's cells are names of files in --images: choose it with --image-column"
        raise _none_looks_like("image", advice, tables)
    best = best if shares[best] > 0 else usual[0]
    further = [name for name in tables.columns if name != best and _names_further_photos(name, tables, folder)]
    return ColumnChoice((best, *further), guessed=True)


def _names_further_photos(column: str, tables: Tables, folder: PhotoFolder) -> bool:
    """Mere numbers may name a file by chance; thumbnails are photos that stand in another column."""
    if any(word in column.casefold() for word in _THUMBNAILS):
        return False
    said = [cell for cell in tables.values(column) if cell][:_SAMPLED]
    looks_so = sum(map(names_photos, said)) > len(said) / 2
    return looks_so and _share_found(column, tables, folder) > 0.5


def _share_found(column: str, tables: Tables, folder: PhotoFolder) -> float:
    """Of some rows, spread over the table, that say something there."""
    said = [record for record in tables.records if record.values[column]]
    some = said[:: max(1, len(said) // _SAMPLED)][:_SAMPLED]
    if not some:
        return 0.0
    if _repeats(column, tables) and any(folder.photos_in(record.values[column]) for record in some):
        return 0.0  # folders of kinds of garments, not of products
    looked_for = (folder.find(record.values[column], record.lists.get(column, ())) for record in some)
    return sum(any(found.path is not None for found in photos) for photos in looked_for) / len(some)


def choose_id(chosen: Sequence[str], tables: Tables, caption: str) -> tuple[ColumnChoice, list[str]]:
    """The column of products, and what is to be said of it.

    Of several usual names, one under which rows come together is taken before one that numbers the rows.

    Args:
        caption: the column by which rows of one product are told from rows that merely have a value in common.

    Raises:
        UserError: its ids were cut.
    """
    choice = choose_column("id", chosen, tables)
    usual = usual_columns("id", tables)
    if not choice.names or not (cut := _cut_id(choice.names[0], tables)):
        first, notes = choice, list[str]()
    elif whole := [name for name in usual if choice.guessed and not _cut_id(name, tables)]:
        first = ColumnChoice((whole[0],), guessed=True)
        notes = [f"products: by {whole[0]}, and not by {choice.name}, whose ids such as {cut!r} were cut by a spreadsheet"]
    else:
        raise UserError(
            f"column {choice.name}: ids such as {cut!r} were cut by a spreadsheet, so products cannot be told apart: export "
            "the column as text, or give another --id-column, or none"
        )
    if not first.guessed or _repeats(first.names[0], tables):
        return first, notes
    for other in usual:
        if other != first.name and not _cut_id(other, tables) and _brings_together(other, tables, caption):
            note = f"products: by {other}, whose values repeat, and not by {first.name}, which is another in each row"
            return ColumnChoice((other,), guessed=True), [*notes, f"{note} (guessed: --id-column)"]
    return first, notes


def _cut_id(column: str, tables: Tables) -> str:
    """One that a spreadsheet has cut, such as 1.08775E+08; else empty."""
    return next((value for value in tables.values(column) if re.fullmatch(r"\d([.,]\d+)?E\+\d\d", value)), "")


def _brings_together(column: str, tables: Tables, caption: str) -> bool:
    """Whether rows with one value are of one product: most have one caption; or they are many, and it is an id by name."""
    captions: dict[str, list[str]] = {}
    for record in tables.records:
        if has_id(value := record.values[column]):
            captions.setdefault(value, []).append(record.values[caption])
    several = [of_value for of_value in captions.values() if len(of_value) > 1]
    same = sum(len(set(filter(None, of_value))) < 2 for of_value in several)
    are_many = sum(map(len, several)) > _MANY * len(tables.records) and _letters(column).endswith("id")
    return bool(several) and (same > len(several) / 2 or are_many)


def has_id(value: str) -> bool:
    """Whether it is no stand-in such as n/a."""
    return re.fullmatch(r"(#?n\.?/?a\.?|none|null|nan|unknown|tbd|[-.?]+|0{8,})?", value, re.IGNORECASE) is None


def _repeats(column: str, tables: Tables) -> bool:
    values = [value for value in tables.values(column) if has_id(value)]
    return len(set(values)) < len(values)


def choose_split(chosen: Sequence[str], tables: Tables) -> tuple[ColumnChoice, list[str]]:
    """A guessed column that holds something else is left aside."""
    choice = choose_column("split", chosen, tables)
    if choice.guessed:
        values = tables.values(choice.names[0])
        if not any(value.casefold() in SPLIT_WORDS for value in values):
            example = next((value for value in values if value), "")
            return NOT_THERE, [f"splits: column {choice.name} holds none (such as {example!r}), so they are drawn"]
    return choice, []


def _none_looks_like(purpose: str, advice: str, tables: Tables) -> UserError:
    of = " and ".join(path.name for path in tables.paths)
    header = ""
    if any(map(names_photos, tables.columns)):
        header = "; these seem to be data: a row with the names of the columns is needed above them"
    elif any(path.suffix.lower() not in (".parquet", ".pq") for path in tables.paths):
        header = "; if that is not its header, delete the rows above"
    return UserError(_with_notes(f"no column of {of} looks like the {purpose}{advice}; {_columns_of(tables)}{header}", tables))


def _with_notes(problem: str, tables: Tables) -> str:
    """With what was guessed of the files, which may be the reason."""
    return "; ".join((problem, *tables.notes))


def _columns_of(tables: Tables) -> str:
    return f"the table has the columns {', '.join((*tables.columns, *tables.photo_columns))}"


def _language(name: str) -> str:
    found = re.search(f"{_LANGUAGE}$", name)
    return found[1] if found else ""


def _letters(name: str) -> str:
    """``productDisplayName``, ``Product display name`` and ``product_display_name`` are the same name; accents do not count,
    nor a language and a channel at the end, as Akeneo has them: ``description-en_US-ecommerce``, nor Google's ``g:``."""
    name = re.sub(f"^g:|{_LANGUAGE}$", "", name)
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    return re.sub(r"[\W_]", "", plain).casefold()


def choose_columns(
    options: PrepareOptions, tables: Tables, folder: PhotoFolder | None
) -> tuple[dict[str, ColumnChoice], list[CaptionTemplate], list[str]]:
    """The columns by purpose, the templates, and what is to be said of the guesses.

    Args:
        folder: of the photos; None where the tables hold them.
    """
    templates = [parse_template(text, tables.columns) for text in options.captions]
    columns = {"image": choose_images(options.image_columns, tables, folder)}
    if folder is not None:
        folder.forget()
    if templates:
        names = tuple(dict.fromkeys(column for template in templates for column in template.columns))
        columns["caption"] = ColumnChoice(names, guessed=False)
    else:
        columns["caption"] = choose_column("caption", _chosen(options.caption_column), tables)
    if not any(map(any, (tables.values(name) for name in columns["caption"].names))):
        raise UserError(_with_notes(f"column {columns['caption'].name}, which has the captions, is empty in every row", tables))
    notes = _other_languages(columns["caption"], tables)
    columns["id"], of_id = choose_id(_chosen(options.id_column), tables, columns["caption"].names[0])
    columns["category"] = choose_column("category", _chosen(options.category_column), tables)
    columns["split"], more = choose_split(_chosen(options.split_column), tables)
    columns["group"] = choose_column("group", _chosen(options.group_column), tables)
    if columns["group"].guessed and columns["group"] in (columns["category"], columns["id"]):
        columns["group"] = NOT_THERE
    return columns, templates, [*tables.notes, *notes, *of_id, *more]


def _chosen(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)
