"""A shop's export: photos, a table, and what is prepared of them."""

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fashionclip_tune.prepare import PrepareOptions, PrepareReport, prepare

NUM = 24  # products


def jpeg(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (4, 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((24, 32)).save(buffer, kind)
    return buffer.getvalue()


class Shop:
    """A folder with photos and a table, and the data set that is prepared of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images, self.out, self.table = folder, folder / "images", folder / "out", folder / "items.csv"
        self.images.mkdir()
        self._count = 0

    def photo(self, name: str, kind: str = "JPEG") -> str:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._count += 1
        path.write_bytes(jpeg(self._count, kind))
        return name

    def prepare(self, table: str | None = None, **options: Any) -> PrepareReport:
        if table is not None:
            self.table.write_text(table)
        given = {"tables": (self.table,), "images": self.images, "out": self.out, "valid_share": 0.3, **options}
        return prepare(PrepareOptions(**given))

    def samples(self) -> dict[str, tuple[str, list[str], str]]:
        """By key: product, captions, split."""
        texts: defaultdict[str, dict[str, str]] = defaultdict(dict)
        found = {}
        for shard in sorted(self.out.glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, name = member.name.split(".", 1)
                    content = tar.extractfile(member)
                    assert content is not None
                    if name == "json":
                        found[key] = (json.load(content)["product_id"], texts[key], shard.name.split("_")[2].split(".")[0])
                    elif name.endswith("txt"):
                        texts[key][name] = content.read().decode()
        return {key: (product, list(captions.values()), split) for key, (product, captions, split) in found.items()}

    def products(self) -> dict[str, set[str]]:
        of: defaultdict[str, set[str]] = defaultdict(set)
        for key, (product, _, _) in self.samples().items():
            of[product].add(key)
        return dict(of)
