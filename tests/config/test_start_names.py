"""Names of starts: what they say, from wherever one stands, and how they are shown."""

from pathlib import Path

import pytest

from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.start_names import absolute, architecture_of, parts, start_labels
from fashionclip_tune.errors import UserError


@pytest.mark.parametrize(
    ("name", "architecture", "place"),
    [
        ("ViT-B-32", "ViT-B-32", None),
        ("ViT-B-16/dfn2b", "ViT-B-16", "dfn2b"),
        ("ViT-B-16=/w/x=1/y.pt", "ViT-B-16", "/w/x=1/y.pt"),
        ("ViT-B-16/dfn2b=/y.pt", "ViT-B-16", "/y.pt"),
        ("hf-hub:shop/name=1", "hf-hub:shop/name=1", None),
        ("local-dir:/x=1/y", "local-dir:/x=1/y", None),
    ],
)
def test_a_name_has_an_architecture_and_weights(name: str, architecture: str, place: str | None) -> None:
    assert (architecture_of(name), parts(name)[1]) == (architecture, place)
    assert absolute(name) == name


def test_folders_here_are_recorded_by_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/lr=1e-4/best", "ViT-B-16/dfn2b", "results/best"):
        (tmp_path / folder).mkdir(parents=True)
    assert absolute("results/best") == absolute("./results/best/") == f"local-dir:{tmp_path / 'results' / 'best'}"
    assert absolute("runs/lr=1e-4/best") == f"local-dir:{tmp_path / 'runs' / 'lr=1e-4' / 'best'}"
    assert absolute("ViT-B-16/dfn2b") == "ViT-B-16/dfn2b", "a tag wins over a folder of its name"
    assert absolute("./ViT-B-16/dfn2b") == f"local-dir:{tmp_path / 'ViT-B-16' / 'dfn2b'}"
    assert absolute("tiny-clip=weights.pt") == f"tiny-clip={tmp_path / 'weights.pt'}"
    assert absolute("results/gone") == "results/gone"


@pytest.mark.parametrize("name", ["ViT-B-32=", "ViT-B-32/", "~nobody-is-called-so/x", "", "local-dir:", "hf-hub:"])
def test_a_name_that_lacks_a_part_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="clip_model = "):
        ProjectConfig(clip_model=name)


def test_labels_are_short_and_no_two_are_alike() -> None:
    snapshots = [f"local-dir:/hub/models--shop--dress/snapshots/{digit * 40}" for digit in "01"]
    labels = start_labels(
        [
            *("ViT-B-16", "ViT-B-16/dfn2b", "hf-hub:Marqo/marqo-fashionSigLIP", "hf-hub:shop/one", "hf-hub:other/one"),
            *("local-dir:/results/first/best", "local-dir:/results/second/best", "local-dir:/a/x", "local-dir:/b/x"),
            *("local-dir:/runs/it/checkpoints/step_00000010", "ViT-B-16=/a/w.pt", "ViT-B-16=/a/w.safetensors", *snapshots),
        ]
    )
    assert list(labels.values()) == [
        *("ViT-B-16", "ViT-B-16/dfn2b", "fashionSigLIP", "shop/one", "other/one"),
        *("first/best", "second/best", "a/x", "b/x"),
        *("it/step_00000010", "ViT-B-16=a/w", "ViT-B-16=a/w-2", "hub/dress", "hub/dress-2"),
    ]


def test_a_label_with_a_number_is_no_other_start_s() -> None:
    named = ["V=/a/w.pt", "V=/a/w.safetensors", "V=/a/w-2.pt", "V=/b/w-2.pt"]
    for names in (named, named[::-1]):
        assert len(set(start_labels(names).values())) == len(names)
