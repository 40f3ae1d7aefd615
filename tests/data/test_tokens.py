"""Which tokens occur: against tokenizing every caption by hand."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from fashionclip_tune.data import tokens
from fashionclip_tune.data.index import load_index
from fashionclip_tune.data.reader import ShardReader
from fashionclip_tune.data.tokens import occurring_tokens


class Counting:
    """A tokenizer that says how many texts it was given."""

    def __init__(self, context_length: int = 77) -> None:
        self.tokenizer_of_openclip = open_clip.SimpleTokenizer(context_length=context_length)
        self.texts = 0

    def __call__(self, texts: Any) -> torch.Tensor:
        self.texts += len(texts)
        found: torch.Tensor = self.tokenizer_of_openclip(texts)
        return found


@pytest.fixture
def index(many_captions: Path) -> Any:
    return load_index(sorted(many_captions.glob("*train*.tar")))


def test_all_captions_of_all_samples_count_and_are_read_once(index: Any) -> None:
    reader = ShardReader(index)
    captions = [caption for sample in range(len(index)) for caption in reader.captions(sample)]
    assert len(captions) > 2 * len(index)
    expected = open_clip.SimpleTokenizer()(captions).unique()
    first, again = Counting(), Counting()
    shown: list[tuple[int, int]] = []
    found = occurring_tokens(index, first, on_progress=lambda *numbers: shown.append(numbers))
    assert torch.equal(found, expected)
    assert first.texts == 1 + len(set(captions))
    assert shown[-1] == (len(index.shards),) * 2
    assert torch.equal(occurring_tokens(index, again), expected)
    assert again.texts == 1


def test_another_length_or_other_captions_are_looked_at_anew(index: Any, garments: Path) -> None:
    whole, short = occurring_tokens(index, Counting()), occurring_tokens(index, Counting(context_length=5))
    assert len(short) < len(whole)
    other = load_index(sorted(garments.glob("*train*.tar")))
    assert not torch.equal(occurring_tokens(other, Counting()), whole)


def test_a_tokenizer_of_the_hub_is_known_by_all_that_it_consists_of() -> None:
    class Backend:
        def __init__(self, said: str) -> None:
            self.said = said

        def to_str(self) -> str:
            return self.said

    class Hub(Counting):
        def __init__(self, said: str) -> None:
            super().__init__()
            self.tokenizer = type("Fast", (), {"backend_tokenizer": Backend(said)})()

    identities = {tokens._identity(tokenizer) for tokenizer in (Hub("a"), Hub("b"), Hub("a"))}
    assert len(identities) == 2


def test_what_is_torn_in_the_cache_is_found_anew(index: Any, cache_of_the_tests: Path) -> None:
    expected = occurring_tokens(index, Counting())
    for path in (cache_of_the_tests / "tokens").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(occurring_tokens(index, Counting()), expected)


def test_an_index_that_has_no_captions_yet_is_made_anew(garments: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As versions before left it."""
    monkeypatch.setenv("FASHIONCLIP_CACHE", str(tmp_path / "cache"))
    shards = [Path(shutil.copy(path, tmp_path)) for path in sorted(garments.glob("*train*.tar"))]
    load_index(shards)
    for shard in shards:
        beside = shard.with_name(f"{shard.stem}.index.npz")
        with np.load(beside) as arrays:
            old = {name: arrays[name] for name in arrays.files if name != "captions"}
        np.savez_compressed(beside, **old | {"format": np.array(6)})
    shutil.rmtree(tmp_path / "cache")
    before = load_index(sorted(garments.glob("*train*.tar")))
    again = load_index(shards)
    assert again.fingerprint == before.fingerprint
    assert torch.equal(occurring_tokens(again, Counting()), occurring_tokens(before, Counting()))
