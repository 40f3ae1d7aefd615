"""What the package takes from OpenCLIP is there, and takes the arguments that it gets; open_clip 4 changes its interface."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "fashionclip_tune"


class Use(NamedTuple):
    """A name of OpenCLIP's in a file of ours, and the keywords that it is called with."""

    file: str
    module: str
    name: str
    keywords: tuple[str, ...] = ()


def uses() -> Iterator[Use]:
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        named: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "open_clip":
                for alias in node.names:
                    named[alias.asname or alias.name] = (str(node.module), alias.name)
                    yield Use(path.name, str(node.module), alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "open_clip":
                yield Use(path.name, "open_clip", node.attr)
            if isinstance(node, ast.Call):
                keywords = tuple(each.arg for each in node.keywords if each.arg)
                function = node.func
                if isinstance(function, ast.Name) and function.id in named:
                    yield Use(path.name, *named[function.id], keywords)
                elif isinstance(function, ast.Attribute) and ast.unparse(function.value) == "open_clip":
                    yield Use(path.name, "open_clip", function.attr, keywords)


FOUND = sorted(set(uses()))


def test_there_are_uses() -> None:
    assert len({(use.module, use.name) for use in FOUND}) > 10


@pytest.mark.parametrize("use", FOUND, ids=lambda use: f"{use.file}: {use.module}.{use.name}({', '.join(use.keywords)})")
def test_a_name_of_openclip_is_there_and_takes_its_arguments(use: Use) -> None:
    found: Any = importlib.import_module(use.module)
    try:
        found = getattr(found, use.name)
    except AttributeError:
        found = importlib.import_module(f"{use.module}.{use.name}")
    if use.keywords:
        parameters = inspect.signature(found).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        assert takes_any or set(use.keywords) <= set(parameters), parameters
