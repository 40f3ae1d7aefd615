"""Private names of other libraries that the package and tests/support rely on: one list, each with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# By the folder that paths in the list are relative to.
SCANNED = {ROOT / "fashionclip_tune": ".", ROOT: "tests/support"}
# Python documents these in spite of their names.
DOCUMENTED = {"_exit", "_fields", "_asdict", "_replace", "_make"}

# (file, name, reason). A name that goes from the code must go from here.
ALLOWED = [
    (
        "storage/pickled.py",
        "torch._C",
        "what torch.load will find in an archive; another reader may find something else",
    ),
    (
        "profiling/forward_pass.py",
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "tensors without storage that know CUDA's autocast: the meta device does not",
    ),
    (
        "profiling/forward_pass.py",
        "torch.utils._python_dispatch.TorchDispatchMode",
        "each operation and the storages that it makes; torch's own counter of operations is one",
    ),
    ("data/loader.py", "iterator._shutdown_workers", "workers live until the garbage collector runs otherwise"),
    ("data/loader.py", "iterator._workers", "a stuck worker is named and ended"),
    ("tuning/study/journal.py", "self._file_path", "the journal's own path, for its records"),
    (
        "tuning/backend/guarded_ray.py",
        "ray._private.ray_constants",
        "Ray decides at its import where it listens",
    ),
    ("tuning/backend/guarded_ray.py", "ray._raylet", "Ray reads its token once a process"),
    (
        "tuning/backend/runner.py",
        "ray._private",
        "ray.init replaces the handler of SIGTERM",
    ),
    ("tuning/backend/runner.py", "ray.train._internal.session.get_session", "Ray keeps a session after a trial"),
    ("tests/support/docs_pages.py", "argparse._HelpAction", "--help has no row in docs/cli.md; its class has no other name"),
    ("tests/support/docs_pages.py", "argparse._SubParsersAction", "only its class tells commands from flags"),
    ("tests/support/docs_pages.py", "command_parser()._actions", "argparse lists a parser's commands nowhere else"),
    ("tests/support/docs_pages.py", "parser._actions", "argparse lists a parser's flags nowhere else but in its help's text"),
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name not in DOCUMENTED | {"_"}


def own_names(tree: ast.Module) -> set[str]:
    """Private names that a module itself defines, at any depth."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
    return names


def foreign_names(tree: ast.Module, of_package: frozenset[str] = frozenset()) -> Iterator[str]:
    """Private names that a module imports, or reaches as attributes, and does not define itself.

    ``of_package``: what ``self`` may inherit from classes in other modules of the package.
    """
    own, inner = own_names(tree), set[ast.AST]()
    for node in ast.walk(tree):  # outer attributes come before those that they contain
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if any(map(is_private, each.name.split("."))))
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{each.name}" for each in node.names]
            yield from (name for name in named if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute):
            known = own | of_package if ast.unparse(node.value) == "self" else own
            if node not in inner and is_private(node.attr) and node.attr not in known:
                yield ast.unparse(node)
                inner |= set(ast.walk(node))
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr")
        ):
            name = node.args[1]
            if (
                isinstance(name, ast.Constant)
                and isinstance(name.value, str)
                and is_private(name.value)
                and name.value not in own
            ):
                yield f"{ast.unparse(node.args[0])}.{name.value}"


def test_each_private_name_of_others_is_listed_with_its_reason() -> None:
    paths = {path.relative_to(root).as_posix(): path for root, part in SCANNED.items() for path in (root / part).rglob("*.py")}
    trees = {file: ast.parse(path.read_text()) for file, path in paths.items()}
    of_package = frozenset().union(*map(own_names, trees.values()))
    found = {(file, name) for file, tree in trees.items() for name in foreign_names(tree, of_package)}
    assert sorted(found) == sorted((file, name) for file, name, _ in ALLOWED)
    assert all(reason for *_, reason in ALLOWED)


def test_private_names_are_found_however_they_are_reached() -> None:
    code = """
import ray._private.worker
from torch import _C
from other._inner import public
_own = ray._private.worker._node.state
self._mine = getattr(pool, "_processes")
thing().entry._cdata = self._mine + _own
os._exit(len(self.__dict__))
class Subclass(Base):
    def run(self): return self._of_base
"""
    assert sorted(foreign_names(ast.parse(code))) == [
        "other._inner.public",
        "pool._processes",
        "ray._private.worker",
        "ray._private.worker._node",
        "self._of_base",
        "thing().entry._cdata",
        "torch._C",
    ]
