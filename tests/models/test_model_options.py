"""What a model cannot take is refused without its weights; what it can take is not, whatever was checked before."""

from typing import Any

import pytest

from fashionclip_tune.config.choices import ClipModelOptions
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import check_model_options

DEMANDING = {"freeze.token_embedding": True, "model.patch_dropout": 0.5, "optimizer.layer_decay": 0.75}


@pytest.mark.parametrize("name", [*(option.value for option in ClipModelOptions), "tiny-clip", "tiny-sig"])
def test_the_models_of_the_spaces_take_every_option_up_to_their_depth(name: str) -> None:
    depth, text_depth = (3, 2) if name.startswith("tiny") else (12, 12)
    config = ProjectConfig(clip_model=name)
    check_model_options(config.with_overrides({**DEMANDING, "freeze.image_blocks": depth, "freeze.text_blocks": text_depth}))
    with pytest.raises(UserError, match=f"freeze.image_blocks = {depth + 1} .* {name} has {depth} there"):
        check_model_options(config.with_overrides({"freeze.image_blocks": depth + 1}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze.image_blocks": 1}, "freeze.image_blocks = 1"),
        ({"model.patch_dropout": 0.5}, "model.patch_dropout = 0.5"),
        ({"optimizer.layer_decay": 0.5}, "optimizer.layer_decay = 0.5"),
    ],
)
def test_a_model_without_blocks_is_refused_what_needs_them(settings: dict[str, Any], message: str) -> None:
    config = ProjectConfig(clip_model="RN50")
    # Nothing of its image tower has a rate, so no layer of it has to be told; this leaves no trace in the next check.
    check_model_options(config.with_overrides({"freeze.image_tower": True, "optimizer.layer_decay": 0.5}))
    with pytest.raises(UserError, match=message):
        check_model_options(config.with_overrides(settings))
    check_model_options(config)


def test_an_unknown_model_is_refused_even_where_nothing_is_asked_of_it() -> None:
    with pytest.raises(UserError, match="ViT-B-31"):
        check_model_options(ProjectConfig(clip_model="ViT-B-31"))
