"""The garments of the synthetic data set: which attributes there are and how a product's are drawn at random.

A product is a set of attributes (``Garment``), each named as a shop would name it. "" is an attribute's unremarkable
value, which no caption names. The collection "pretraining" has only some of the kinds, colours and patterns of "sweep".
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

Colour = tuple[int, int, int]

# fmt: off
COLOURS: dict[str, Colour] = {
    "black": (32, 32, 35), "white": (246, 246, 243), "grey": (138, 140, 144), "navy": (32, 42, 88),
    "blue": (54, 104, 200), "red": (204, 40, 44), "burgundy": (112, 24, 46), "pink": (238, 150, 178),
    "purple": (118, 66, 158), "green": (44, 140, 78), "olive": (108, 110, 56), "yellow": (240, 204, 62),
    "beige": (216, 196, 160), "brown": (112, 72, 44),
}
_PATTERNS = (
    "plain", "striped", "vertical striped", "diagonal striped", "checked", "polka dot", "floral", "colour block",
)


@dataclass(frozen=True)
class Kind:
    """A kind of garment: its silhouette and, for each attribute, the values to draw from."""

    body: str  # torso, jumpsuit, skirt or legs
    hems: Mapping[str, float]  # length -> how far below the neck (or waistband) the garment ends
    cuts: Mapping[str, float]  # cut -> half the width at the hem
    sleeves: tuple[str, ...] = ("",)
    necklines: tuple[str, ...] = ("",)
    closures: tuple[str, ...] = ("",)
    details: tuple[str, ...] = ("",)
    ribbed: bool = False
    womens: bool = False


_SLEEVES = ("short sleeve", "three-quarter sleeve", "long sleeve")
_ANY_SLEEVE = (*_SLEEVES, "sleeveless")
_TOP = {"": 62.0, "cropped": 46.0, "longline": 76.0}
_FIT = {"": 19.0, "slim": 15.5, "oversized": 24.0}
_ROUND = ("crew neck", "v-neck", "scoop neck", "boat neck")
_COLLARS = ("classic collar", "stand collar", "lapel", "hooded")
_WAIST = ("", "patch pockets", "belt")
_LEGS = (*_WAIST, "side stripe", "drawstring")

KINDS = {
    "t-shirt": Kind("torso", _TOP, _FIT, _SLEEVES, _ROUND, details=("", "", "chest pocket", "contrast trim")),
    "tank top": Kind("torso", _TOP, _FIT, ("sleeveless",), ("v-neck", "scoop neck", "square neck"),
                     details=("", "contrast trim")),
    "shirt": Kind("torso", _TOP, _FIT, _SLEEVES, _COLLARS[:2], ("buttons",), ("", "chest pocket", "patch pockets")),
    "polo shirt": Kind("torso", {"": 62}, _FIT, _SLEEVES[::2], _COLLARS[:1], ("buttoned placket", "zipped placket"),
                       ("", "chest pocket", "contrast trim")),
    "sweater": Kind("torso", _TOP, _FIT, _SLEEVES[1:], ("crew neck", "v-neck", "boat neck", "turtleneck"),
                    details=("", "contrast trim"), ribbed=True),
    "cardigan": Kind("torso", _TOP, _FIT, _SLEEVES[1:], _ROUND[:2], ("buttons", "zip", "open front"), _WAIST,
                     ribbed=True),
    "sweatshirt": Kind("torso", _TOP, _FIT, _SLEEVES[::2], ("hooded", "hooded", "crew neck"), ("", "zip"),
                       ("", "kangaroo pocket", "contrast trim"), ribbed=True),
    "vest": Kind("torso", _TOP, _FIT, ("sleeveless",), ("v-neck", "stand collar", "lapel"), ("buttons", "zip"),
                 _WAIST),
    "jacket": Kind("torso", {"": 58, "cropped": 46}, _FIT, ("long sleeve",), _COLLARS,
                   ("zip", "buttons", "double buttons"), (*_WAIST, "chest pocket")),
    "coat": Kind("torso", {"mid-length": 84, "full length": 106}, {"": 24, "slim": 19, "A-line": 31}, ("long sleeve",),
                 _COLLARS, ("zip", "buttons", "double buttons"), _WAIST),
    "dress": Kind("torso", {"mini": 66, "knee length": 84, "maxi": 108}, {"": 22, "fitted": 17, "A-line": 34},
                  _ANY_SLEEVE, (*_ROUND, "square neck"), ("", "", "buttons"), ("", "belt", "contrast trim"),
                  womens=True),
    "jumpsuit": Kind("jumpsuit", {"": 110, "cropped": 92}, {"": 19, "slim": 15, "wide-leg": 27}, _ANY_SLEEVE,
                     ("crew neck", "v-neck", "square neck", "classic collar"), ("", "zip", "buttons"), _WAIST,
                     womens=True),
    "skirt": Kind("skirt", {"mini": 36, "knee length": 56, "maxi": 80}, {"pencil": 17, "A-line": 31, "pleated": 29},
                  closures=("", "", "buttons"), details=_WAIST, womens=True),
    "trousers": Kind("legs", {"": 84, "cropped": 68}, {"": 18.5, "slim": 15, "wide-leg": 28}, details=_LEGS),
    "shorts": Kind("legs", {"": 40, "mini": 31, "knee length": 50}, {"": 22, "slim": 19, "wide-leg": 27},
                   details=_LEGS),
}

_PRETRAINING_KINDS = ("t-shirt", "shirt", "sweater", "jacket", "coat", "dress", "skirt", "trousers", "shorts")
_PRETRAINING_COLOURS = ("black", "white", "grey", "blue", "red", "pink", "green", "yellow", "brown")
_PRETRAINING_PATTERNS = ("plain", "striped", "checked", "polka dot")
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Garment:
    """What a caption may say of a product; "" also where an attribute does not apply."""

    department: str
    kind: str
    colour: str
    second_colour: str
    pattern: str
    length: str
    cut: str
    sleeve: str
    neckline: str
    closure: str
    detail: str


def random_garment(rng: random.Random, collection: str) -> Garment:
    """A product's attributes, keeping to what is found in shops (no men's crop tops, no navy dots on black)."""
    pretraining = collection == "pretraining"
    name = rng.choice(_PRETRAINING_KINDS if pretraining else tuple(KINDS))
    kind = KINDS[name]
    department = "women" if kind.womens or rng.random() < 0.5 else "men"
    not_for_men = ("cropped", "mini", "floral") if department == "men" else ()
    patterns = [p for p in (_PRETRAINING_PATTERNS if pretraining else _PATTERNS) if p not in not_for_men]
    pattern = "plain" if rng.random() < 0.25 else rng.choice(patterns)
    colours = _PRETRAINING_COLOURS if pretraining else tuple(COLOURS)
    colour = rng.choice(colours)
    contrasting = [other for other in colours if math.dist(COLOURS[colour], COLOURS[other]) > 130]
    return Garment(
        department=department,
        kind=name,
        colour=colour,
        second_colour="" if pattern == "plain" else rng.choice(contrasting),
        pattern=pattern,
        length=rng.choice([length for length in kind.hems if length not in not_for_men]),
        cut=rng.choice([cut for cut in kind.cuts if cut != "pleated" or "striped" not in pattern]),
        sleeve=rng.choice(kind.sleeves),
        neckline=rng.choice(kind.necklines),
        closure=rng.choice(kind.closures),
        detail=rng.choice(kind.details),
    )
