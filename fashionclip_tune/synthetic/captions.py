"""What a copywriter says of a garment: each product has three captions, worded differently in the two collections."""

import random

from fashionclip_tune.synthetic.garments import Garment

# fmt: off
# Other words that the paraphrases of "sweep" may use for a title's.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "women": ("ladies", "her"), "men": ("gents", "him"),
    "navy": ("dark blue", "midnight"), "grey": ("gray", "charcoal"), "burgundy": ("wine red", "maroon"),
    "beige": ("sand", "cream"), "olive": ("khaki", "army green"), "purple": ("violet",), "pink": ("rose",),
    "plain": ("solid", "single-colour"), "striped": ("stripy", "breton"), "vertical striped": ("pinstriped",),
    "diagonal striped": ("slant-striped",), "checked": ("plaid", "gingham"), "polka dot": ("dotted", "spotted"),
    "floral": ("flower print", "flowery"), "colour block": ("two-tone", "panelled"),
    "t-shirt": ("tee", "jersey top"), "tank top": ("sleeveless top", "cami"), "shirt": ("button-up",),
    "polo shirt": ("polo",), "sweater": ("jumper", "pullover"), "cardigan": ("knit jacket",), "sweatshirt": ("fleece",),
    "vest": ("waistcoat", "gilet"), "jacket": ("blouson",), "coat": ("overcoat",), "dress": ("gown", "frock"),
    "jumpsuit": ("all-in-one",), "trousers": ("pants", "slacks"),
    "mini": ("short",), "knee length": ("midi",), "maxi": ("ankle length", "floor length"), "longline": ("long",),
    "slim": ("skinny", "narrow"), "oversized": ("loose", "relaxed"), "wide-leg": ("flared",), "A-line": ("swing",),
    "short sleeve": ("short sleeves", "short arms"), "long sleeve": ("long sleeves", "full-length sleeves"),
    "three-quarter sleeve": ("three-quarter sleeves", "elbow sleeves"), "sleeveless": ("no sleeves", "bare arms"),
    "crew neck": ("a round neckline", "a crew neckline"), "v-neck": ("a v-neckline", "a plunging neck"),
    "scoop neck": ("a scooped neck", "a low round neck"), "boat neck": ("a wide neck", "a bateau neckline"),
    "square neck": ("a square neckline",), "turtleneck": ("a roll neck", "a high neck"), "hooded": ("a hood",),
    "classic collar": ("a pointed collar", "a shirt collar"), "stand collar": ("a mandarin collar",),
    "lapel": ("notched lapels", "a tailored collar"), "buttons": ("a button front", "a row of buttons"),
    "double buttons": ("a double-breasted front",), "zip": ("a zipper", "a zip front"),
    "belt": ("a tied waist", "a waist belt"), "contrast trim": ("contrasting edges",), "side stripe": ("side piping",),
}

# The words of the collection "pretraining", where they are not those of a title.
_PRETRAINING_WORDS = {
    "t-shirt": "tee", "shirt": "button-up", "sweater": "jumper", "trousers": "pants",
    "checked": "plaid", "polka dot": "dotted",
}
# fmt: on

Captions = tuple[str, str, str]


def write_captions(rng: random.Random, garment: Garment, collection: str) -> Captions:
    return (_pretraining_captions if collection == "pretraining" else _sweep_captions)(rng, garment)


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _sweep_captions(rng: random.Random, g: Garment) -> Captions:
    """The shop's title, then two descriptions in other words and another order, each leaving something out at times."""
    colours = " and ".join(filter(None, (g.colour, g.second_colour)))
    extras = " and ".join(filter(None, (g.closure, g.detail)))
    pattern = "" if g.pattern == "plain" else g.pattern
    title = _join(g.department, colours, pattern, g.length, g.cut, g.sleeve, g.neckline, g.kind)
    title = _join(title, extras and f"with {extras}")
    title = " ".join(word if word in ("and", "with") else word.title() for word in title.split())

    def say(word: str) -> str:
        return rng.choice((word, *_SYNONYMS.get(word, ())))

    def describe(template: str) -> str:
        features = [say(word) for word in (g.sleeve, g.neckline, g.closure, g.detail) if word]
        rng.shuffle(features)
        if len(features) > 2 and rng.random() < 0.5:
            features.pop()
        return template.format(
            who=say(g.department),
            kind=say(g.kind),
            colours=rng.choice((" and ", " with ", "/")).join(say(c) for c in (g.colour, g.second_colour) if c),
            pattern=say(g.pattern),
            shape=_join(say(g.length), say(g.cut)) or "regular",
            features=", ".join(features) or "a simple design",
        )

    templates = (
        "{pattern} {kind} in {colours} for {who}, {shape} with {features}",
        "a {shape} {colours} {kind} with {features}, {pattern}, for {who}",
        "{kind} for {who}: {features}, {shape} fit, {pattern} {colours}",
        "this {pattern} {kind} comes in {colours} and has {features}",
        "{colours} {pattern} {kind} with {features}, {shape} shape",
    )
    first, second = rng.sample(templates, 2)
    return title, describe(first), describe(second)


def _pretraining_captions(rng: random.Random, g: Garment) -> Captions:
    """Captions as found on the web: they name colour, pattern, kind, length and sleeves at best, never a collar."""
    kind, pattern = (_PRETRAINING_WORDS.get(word, word) for word in (g.kind, g.pattern))
    colours = _join(g.colour, g.second_colour and f"and {g.second_colour}")
    sleeves = {"sleeveless": " with no sleeves", "": ""}.get(g.sleeve, f" with {g.sleeve}s")
    templates = (
        f"picture of someone's {kind}, {pattern}, {colours}",
        f"{kind} in {colours}{sleeves}",
        f"{g.length or 'nice'} {pattern} {kind}, {colours}",
        f"my new {colours} {pattern} {kind}",
    )
    first, second = rng.sample(templates, 2)
    return f"a photo of a {_join(colours, pattern, g.length, kind)}{sleeves}", first, second
