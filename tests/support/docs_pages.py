"""Makes docs/settings.md and docs/cli.md of what the code says of itself; ``make docs`` writes them.

Settings come from the sections of the configuration: types, defaults, the docstring below each field, and the limits that
``_check`` has. Flags come from the parsers. A field or flag that says nothing is an error here.
"""

import argparse
import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from fashionclip_tune.cli.main import command_parser
from fashionclip_tune.config.project import ProjectConfig
from fashionclip_tune.config.section import annotations, plain

ROOT = Path(__file__).parents[2]
MADE = "<!-- Made by `make docs` from {source}. Change it there. -->"

SETTINGS = """# Settings

A setting has a dotted path. Give it as `--set PATH=VALUE` to `run_sweep.py`, `train`, `evaluate`, `export` and `probe`, or as
`config.with_overrides({"PATH": VALUE})` in Python, or return it from a search space ([spaces.md](spaces.md)). A wrong path or
value ends with one line that says what is allowed. "None" is written `none` on the command line and `None` in Python.

In a sweep some settings have a flag of their own, which `--set` then refuses and names: the budget, the stage, the seed, the
device, the data ([cli.md](cli.md)).

A run that is resumed may have another value of a setting marked with \\*: it changes no number of the run. Data and
first weights are compared by their content.
"""

AFTER_SECTION = {
    "training.": """
When memory runs out, a run halves its micro-batch, says so and does the same step again. At one photo it ends, and so does
one whose batch norms are updated (`model.batch_norm`).
""",
    "model.": """
**Weights from the hub.** Published weights come from the Hugging Face hub into `openclip_cache/`. Without a network, copy a
cache there, or name one model and its file: `--set clip_model=ViT-B-32 --set
model.pretrained=/path/to/open_clip_model.safetensors`.

**An OpenCLIP folder** is architecture, weights, tokenizer and preprocessing in one: `--set clip_model=local-dir:FOLDER` (or
`hf-hub:OWNER/NAME`, kept in the hub's own cache). Beside it `model.pretrained` names other weights for that architecture: a
file, another folder, or `none` for random ones. What is loaded is compared with the file, bit by bit. Python files that a
folder names (`trust_remote_code`, `auto_map`) are never run.

**A weights file** does not say how photos are prepared. That is taken from a `checkpoint.json` of this project or an
`open_clip_config.json` beside it, else from OpenCLIP's published weights of the architecture. Where these differ (ViT-L-14,
ViT-H-14), or there are none, the file is refused, and the message says what to write where.
""",
    "freeze.": """
A model that lacks what is to be frozen, dropped or told apart is refused before a sweep starts.
""",
}

CLI = """# Commands and flags

Every command has `--help`. Wrong input ends with one line that says what is allowed, and exit status 2, before anything is
started. `--set` takes the settings of [settings.md](settings.md).
"""

_KINDS = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Path: "path"}


def settings_page() -> str:
    """docs/settings.md."""
    sections = [("", ProjectConfig)]
    sections += [(f"{name}.", kind) for name, kind in annotations(ProjectConfig).items() if is_dataclass(kind)]
    parts = [MADE.format(source="`fashionclip_tune/config/`"), SETTINGS]
    for prefix, section in sections:
        rows = "\n".join(_settings_rows(section, prefix))
        parts.append(f"## {f'`{prefix}*`' if prefix else 'The run'}\n\n{_markdown(_docstring(section))}\n")
        parts.append(
            f"| setting | allowed | default | what it does |\n|---|---|---|---|\n{rows}\n{AFTER_SECTION.get(prefix, '')}"
        )
    return "\n".join(parts)


def cli_page() -> str:
    """docs/cli.md."""
    parts = [MADE.format(source="the parsers in `fashionclip_tune/cli/`"), CLI]
    (commands,) = (each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        parts.append(_command(f"python -m fashionclip_tune {name}", parser))
    return "\n".join(parts)


def _settings_rows(section: Any, prefix: str) -> Iterator[str]:
    said, limits = _field_docstrings(section), _limits(section)
    for field, annotation in zip(fields(section), annotations(section).values(), strict=True):
        if is_dataclass(annotation):
            continue
        if field.name not in said:
            raise ValueError(f"{prefix}{field.name} has no docstring below it")
        mark = "" if field.metadata.get("fingerprint", True) else " \\*"
        what = said[field.name] + "".join(f"<br>{each}" for each in _meanings(annotation))
        default = plain(field.default)
        shown = str(default).lower() if default is None or isinstance(default, bool) else str(default)
        yield _row(f"`{prefix}{field.name}`{mark}", _allowed(annotation, limits.get(field.name)), f"`{shown}`", what)


def _allowed(annotation: Any, limit: str | None) -> str:
    """The type in words and the limit that ``_check`` has."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    options = typing.get_args(annotation) if union else (annotation,)
    kinds = []
    for option in (option for option in options if option is not type(None)):
        if issubclass(option, Enum):
            kinds += [f"`{member.value}`" for member in option]
        else:
            kinds.append(limit if option is str and limit else _KINDS[option])
    text = " or ".join([", ".join(kinds[:-1]), kinds[-1]]) if len(kinds) > 1 else kinds[0]
    text += f", {limit}" if limit and str not in options else ""
    return text + (", or none" if type(None) in options and not text.endswith("or none") else "")


def _meanings(annotation: Any) -> Iterator[str]:
    """What each value of an enumeration means: the comment behind it."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        for value, comment in re.findall(r'^    \w+ = "([^"]+)"  # (.+)$', inspect.getsource(annotation), re.MULTILINE):
            yield f"`{value}`: {comment}"


def _class_tree(section: Any) -> ast.ClassDef:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    return tree


def _field_docstrings(section: Any) -> dict[str, str]:
    """The text below each field."""
    body = _class_tree(section).body
    said = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            said[field.target.id] = " ".join(ast.literal_eval(below.value).split()).rstrip(".")
    return said


def _limits(section: Any) -> dict[str, str]:
    """What ``self._require(condition, name, allowed)`` allows, of a name or of each in the loop around it."""
    found: dict[str, str] = {}
    checks = [each for each in _class_tree(section).body if isinstance(each, ast.FunctionDef) and each.name == "_check"]
    for check in checks:
        loops: dict[ast.AST, list[str]] = {}
        for loop in (node for node in ast.walk(check) if isinstance(node, ast.For)):
            loops |= dict.fromkeys(ast.walk(loop), ast.literal_eval(loop.iter))
        for call in (node for node in ast.walk(check) if isinstance(node, ast.Call)):
            if not (isinstance(call.func, ast.Attribute) and call.func.attr == "_require"):
                continue
            condition, name, allowed = call.args
            # What depends on another setting, with its value or as an exception ("not both"), is said by the docstring.
            if isinstance(allowed, ast.Constant) and not isinstance(condition, ast.UnaryOp):
                for each in [ast.literal_eval(name)] if isinstance(name, ast.Constant) else loops[call]:
                    found[each] = f"{found[each]}; {allowed.value}" if each in found else str(allowed.value)
    return found


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in (action for action in parser._actions if not isinstance(action, argparse._HelpAction)):
        if not action.help:
            raise ValueError(f"{name} {action.dest} has no help")
        flags = ", ".join(action.option_strings)
        values = action.metavar or ("|".join(action.choices) if action.choices else action.dest.upper())
        shown = f"{flags} {values}".strip() if action.nargs != 0 else flags
        rows.append(_row(f"`{shown}`", _markdown(action.help % vars(action)), "yes" if action.required else ""))
    texts = [_markdown(text) for text in (parser.description, parser.epilog) if text]
    if not texts:
        raise ValueError(f"{name} has no description")
    table = "| flag | meaning | needed |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return "\n".join([f"## `{name}`\n", f"{texts[0]}\n", *([table] if table else []), *(f"{text}\n" for text in texts[1:])])


def _docstring(section: Any) -> str:
    return inspect.cleandoc(section.__doc__)


def _markdown(text: str) -> str:
    """Flags in code, links from docs/; a docstring's double backticks become single ones."""
    text = re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)(?![\w`])", r"`\1`", text.replace("``", "`"))
    return re.sub(r"\bdocs/([a-z0-9-]+\.md)", r"[\1](\1)", text)


def _row(*cells: str) -> str:
    return "| " + " | ".join(_markdown(cell).replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    for path, page in (("docs/settings.md", settings_page()), ("docs/cli.md", cli_page())):
        (ROOT / path).write_text(page)
        print(path)
