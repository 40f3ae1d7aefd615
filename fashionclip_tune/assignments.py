"""``--set PATH=VALUE``, the same for every command."""

from collections.abc import Sequence

from fashionclip_tune.errors import UserError


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """``["training.epochs=2"]`` to ``{"training.epochs": "2"}``; the configuration converts and checks the values."""
    pairs = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} is not allowed: write PATH=VALUE, such as training.epochs=2")
        pairs[path.strip()] = value.strip()
    return pairs
