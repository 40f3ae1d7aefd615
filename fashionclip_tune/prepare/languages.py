"""Whether a caption looks English, by a rule that can be read here: letters outside Latin script, and common words.

It sees a caption in Cyrillic, Chinese or Arabic, and one with two words from its lists. It does not see a short caption
without them ("Canapé gris"), nor a language that has no list.
"""

import re
import unicodedata

RULE = (
    "half of the letters outside Latin script, or at least two common or garment words of German, French, Spanish, Italian, "
    "Dutch, Portuguese, Polish, Swedish or Turkish and more of them than common English words; "
    "short captions without such words are not seen"
)
_NON_LATIN_SHARE = 0.5
_MIN_WORDS = 2
# Left out is what English product names use as well: de, la, le, di, et, pour, robe, jean, top, die, man, on, a, no.
_WORDS = {
    "German": """und mit für der das ein eine aus von ohne sehr auch nicht ist im zum zur kleid hose hemd bluse jacke schuhe
        rock mantel pullover tasche damen herren rot rotes rote blau blaues blaue schwarz schwarze schwarzes weiß weiße weißes
        ärmel gürtel""",
    "French": """avec sans les des une du aux est sur dans par ou cette ces chemise pantalon jupe veste manteau chaussures sac
        femme homme rouge bleu noir noire blanc blanche manches coton""",
    "Spanish": """con sin los las una del para por y muy este esta vestido camisa camiseta pantalón falda chaqueta abrigo
        zapatos bolso mujer hombre rojo roja azul negro negra blanco blanca mangas algodón""",
    "Italian": """con senza gli della delle dei una per che nel nella questo abito camicia maglietta pantaloni gonna giacca
        cappotto scarpe borsa donna uomo rosso rossa blu nero nera bianco bianca maniche cotone""",
    "Dutch": """met zonder het een van voor en deze jurk broek overhemd rok jas trui schoenen tas dames heren rood rode blauw
        blauwe zwart zwarte wit witte mouwen katoen""",
    "Portuguese": """com sem os uma dos das para por e muito vestido camisa calça saia jaqueta casaco sapatos bolsa mulher
        homem vermelho vermelha azul preto preta branco branca mangas algodão""",
    "Polish": """z bez dla oraz się jest na w sukienka spodnie koszula spódnica kurtka płaszcz buty torebka damska damskie męska
        męskie czerwona czerwony niebieska niebieski czarna czarny biała biały bawełny""",
    "Swedish": """med utan och för ett en av klänning byxor skjorta kjol jacka kappa skor väska dam herr röd röda blå svart
        svarta vit vita ärmar bomull""",
    "Turkish": """ve ile için bir bu olan elbise pantolon gömlek etek ceket çanta erkek mavi siyah beyaz kollu pamuk""",
}
_WORDS_OF = {language: frozenset(words.casefold().split()) for language, words in _WORDS.items()}
_ENGLISH = frozenset(
    [
        "the",
        "and",
        "with",
        "in",
        "of",
        "for",
        "by",
        "from",
        "this",
        "that",
        "is",
        "are",
        "at",
        "to",
        "on",
        "its",
        "it",
        "an",
        "as",
        "or",
        "your",
        "you",
        "has",
        "men",
        "women",
        "mens",
        "womens",
        "boys",
        "girls",
        "shirt",
        "shirts",
        "dress",
        "shoes",
        "shoe",
        "pants",
        "jeans",
        "jacket",
        "sleeve",
        "sleeves",
        "black",
        "white",
        "blue",
        "red",
        "green",
        "grey",
        "gray",
    ]
)


def looks_foreign(caption: str) -> str | None:
    """The language that a caption seems to be in, "not Latin script" for all other scripts, or None: it may be English."""
    text = unicodedata.normalize("NFC", caption).casefold()
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return None
    if not text.isascii():
        foreign = sum(not (letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")) for letter in letters)
        if foreign >= _NON_LATIN_SHARE * len(letters):
            return "not Latin script"
    words = set(re.findall(r"[^\W\d_]+", text))
    counts = {language: len(words & known) for language, known in _WORDS_OF.items()}
    language = max(counts, key=lambda name: counts[name])
    return language if counts[language] >= max(_MIN_WORDS, len(words & _ENGLISH) + 1) else None
