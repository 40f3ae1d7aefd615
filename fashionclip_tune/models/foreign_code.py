"""Python files that a model's folder, or its place on the hub, names: never run, whatever its description asks for.

An OpenCLIP folder asks by ``tokenizer_kwargs.trust_remote_code``; files of transformers name such code as ``auto_map``, and
where nobody has answered, transformers asks at the keyboard.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fashionclip_tune.errors import UserError

_FLAG, _NAMES = "trust_remote_code", "auto_map"
_CURE = "a tokenizer of plain files (tokenizer.json) needs none: save one there, and take out what names Python files"


def refuse_code(described: object, where: object) -> None:
    """Raises UserError where a description asks, at any depth, for foreign code to be run."""
    for path, value in _flags(described):
        if value is not None and value is not False:
            raise UserError(
                f"{where} asks for Python files of its own to be run ({path} = {value!r}), which is never done: {_CURE}"
            )


def _flags(described: object, above: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(described, Mapping):
        for name, value in described.items():
            if name == _FLAG:
                yield f"{above}{name}", value
            yield from _flags(value, f"{above}{name}.")
    elif isinstance(described, Sequence) and not isinstance(described, str):
        for value in described:
            yield from _flags(value, above)


@contextmanager
def no_foreign_code(where: object) -> Iterator[None]:
    """Within, transformers imports no file that is not its own, asks nobody, and takes no other class for a tokenizer's.

    Raises:
        UserError: there is no way to load it without.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers import dynamic_module_utils as gate
    from transformers.models.auto import tokenization_auto as classes
    from transformers.utils.import_utils import DummyObject

    def refuse(*args: object, **options: object) -> None:
        raise _refusal(where)

    def tokenizers_alone(class_name: str) -> Any:
        found = class_of(class_name)
        # Any of its classes would be taken, and a network may be described on the hub. A dummy says what is not installed.
        if found is None or isinstance(found, DummyObject) or issubclass(found, PreTrainedTokenizerBase):
            return found
        raise UserError(f"{where} names {class_name} as its tokenizer_class, which is no tokenizer of transformers: {_CURE}")

    # All of its ways to code pass the first; the second is the time in which it asks at the keyboard.
    before = gate.get_cached_module_file, gate.TIME_OUT_REMOTE_CODE
    class_of = classes.tokenizer_class_from_name
    gate.get_cached_module_file, gate.TIME_OUT_REMOTE_CODE = refuse, 0  # type: ignore[assignment]
    classes.tokenizer_class_from_name = tokenizers_alone
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError) or _FLAG not in str(error):
            raise
        raise _refusal(where) from error
    finally:
        gate.get_cached_module_file, gate.TIME_OUT_REMOTE_CODE = before
        classes.tokenizer_class_from_name = class_of


def _refusal(where: object) -> UserError:
    return UserError(f"{where} cannot be loaded without Python files of its own ({_NAMES}), which are never run: {_CURE}")


def drop_code_names(tokenizer: Any, where: object) -> None:
    """Warns of code that a tokenizer of transformers names and was loaded without; it is not named in copies of it."""
    inner = getattr(tokenizer, "tokenizer", None)
    if getattr(inner, "init_kwargs", {}).pop(_NAMES, None) is not None:
        warnings.warn(
            f"the tokenizer of {where} names Python files ({_NAMES}), which are not run; {type(inner).__name__} is used",
            stacklevel=2,
        )
