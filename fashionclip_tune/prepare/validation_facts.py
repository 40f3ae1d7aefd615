"""What can be measured on a validation split at all: the ceiling, chance, and how wide an interval is."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fashionclip_tune.data.shards import normalised_caption

FEWEST_PRODUCTS = 300
"""By fewer, settings are hardly told apart: see ``ValidationFacts.half_width``."""
_TOLD_APART = "0.01 to 0.05"  # by which settings of a sweep usually differ


@dataclass(frozen=True)
class ValidationFacts:
    """By the protocol ``instance``, where a query's only right answer is its own photo or caption.

    Attributes:
        shared_captions: photos whose caption, but for case and spaces, is that of another one, too.
        ceiling_at_1, ceiling_at_10: mean of min(k, m) / m over photos whose caption m photos share. Their captions are the
            same query, so at most min(k, m) of the m queries find their own photo; the other way they are tied, which counts
            as a random order.
        chance_at_10: of a random order.
        half_width: of a 95 % interval of a recall of one half, if products were single queries.
    """

    photos: int
    products: int
    shared_captions: int
    ceiling_at_1: float
    ceiling_at_10: float
    chance_at_10: float
    half_width: float

    def lines(self) -> list[str]:
        count = f"{self.photos:,} photos of {self.products:,} products"
        lines = [f"validation: {count}; a random order has a Recall@10 of {self.chance_at_10:.3f}"]
        if self.shared_captions:
            lines.append(
                f"  {self.shared_captions:,} photos share their caption with others: at instance level Recall@1 cannot exceed "
                f"{self.ceiling_at_1:.3f}, nor Recall@10 {self.ceiling_at_10:.3f}; captions that say more help, such as "
                "--caption '{title}, {colour}, {brand}'"
            )
        if self.products < FEWEST_PRODUCTS:
            lines.append(
                f"warning: validation has fewer than {FEWEST_PRODUCTS} products: a 95 % interval of Recall@10 is some "
                f"{self.half_width:.2f} to either side at 0.5, and settings usually differ by {_TOLD_APART}; a larger "
                "--valid-share helps, or more products"
            )
        return lines


def validation_facts(captions: Sequence[str], products: Sequence[str]) -> ValidationFacts:
    """Of the original captions and the products of photos, one at least."""
    of_caption = Counter(map(normalised_caption, captions))
    shared = list(of_caption.values())
    num, num_products = len(captions), len(set(products))

    def ceiling(k: int) -> float:
        return sum(min(k, m) for m in shared) / num

    return ValidationFacts(
        photos=num,
        products=num_products,
        shared_captions=sum(m for m in shared if m > 1),
        ceiling_at_1=ceiling(1),
        ceiling_at_10=ceiling(10),
        chance_at_10=min(1.0, 10 / num),
        half_width=1.96 * 0.5 / math.sqrt(num_products),
    )
