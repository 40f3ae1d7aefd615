import math

import pytest

from fashionclip_tune.config.choices import ClipModelOptions
from fashionclip_tune.errors import UserError
from fashionclip_tune.models.architecture import forward_flops


def blocks_flops(width: int, tokens: int, depth: int, *, mlp_ratio: float = 4) -> float:
    """Of a transformer's blocks, by hand: projections 8 w^2, MLP 4 r w^2 and attention 4 t w a token."""
    return depth * tokens * ((8 + 4 * mlp_ratio) * width**2 + 4 * tokens * width)


@pytest.mark.parametrize(("model", "patches"), [(ClipModelOptions.ViT_B_32.value, 49), (ClipModelOptions.ViT_B_16.value, 196)])
def test_operations_are_those_of_the_blocks_and_a_few_percent(model: str, patches: int) -> None:
    by_hand = blocks_flops(768, patches + 1, 12) + blocks_flops(512, 77, 12)
    assert by_hand < forward_flops(model) < 1.05 * by_hand


def test_the_three_models_are_ordered_as_they_train_not_by_their_parameters() -> None:
    names = [option.value for option in ClipModelOptions]
    assert sorted(names, key=forward_flops) == ["ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP2-256"]


def test_a_text_tower_from_the_hub_counts_as_dearest_and_an_unknown_model_is_refused() -> None:
    assert forward_flops("roberta-ViT-B-32") == math.inf
    with pytest.raises(UserError, match="ViT-B-31"):
        forward_flops("ViT-B-31")
