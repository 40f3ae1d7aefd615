"""What is frozen where nobody says otherwise: a large token embedding on a small card."""

from collections.abc import Mapping
from functools import cache

from fashionclip_tune.architectures import check_architecture
from fashionclip_tune.config import ProjectConfig
from fashionclip_tune.model_check import has_known_text_tower, without_numbers

# An embedding table takes 16 bytes a number while it is trained: weight, gradient and Adam's two moments.
_TRAINED_BYTES = 16
_LARGE_TABLE_BYTES = 10**9
_SMALL_CARD_BYTES = 20 * 10**9
_TABLE = "freeze.token_embedding"


def with_default_freeze(config: ProjectConfig, card_bytes: int | None, given: Mapping[str, object]) -> ProjectConfig:
    """On a small card a large token embedding is frozen, unless a space or ``--set`` speaks of it.

    Args:
        card_bytes: None: no card, or none that is known.
        given: settings by path that somebody has decided on.
    """
    if card_bytes is None or card_bytes >= _SMALL_CARD_BYTES or _TABLE in given or not has_large_token_table(config):
        return config
    return config.with_overrides({_TABLE: True})


def has_large_token_table(config: ProjectConfig) -> bool:
    """Whether training the token embedding takes a GB or more: SigLIP2's, half of all its parameters, takes 3.1."""
    if not has_known_text_tower(check_architecture(config.model_name)):
        return False
    return _token_table_numbers(config.model_name) * _TRAINED_BYTES >= _LARGE_TABLE_BYTES


@cache
def _token_table_numbers(name: str) -> int:
    named = without_numbers(name).named_parameters()
    return sum(parameter.numel() for path, parameter in named if "token_embedding." in path)
