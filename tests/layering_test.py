"""The house rules that a program can check, over the syntax tree of every file of the package.

Oracle: small synthetic files, each breaking one rule, must be reported; see `test_checker_reports`.
"""

import ast
import collections
import graphlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = "qwenla_jax"
# Data flows down this list: a file imports from its own room and from those above it in the list. `config` has two
# rooms: the schema lies low, the settings that are composed of other rooms' types lie high.
ROOMS = (
    "utils",
    "types",
    "config.schema",
    "config.shared_options",
    "text",
    "data",
    "rewards",
    "model",
    "weights",
    "config",
    "parallel",
    "reattention",
    "sampling",
    "inference",
    "serve",
    "run",
    "train",
    "tools",
    "distill",
    "planner",
    "evals",
    "study",
    "recipes",
    "cli",
)
# Files of one name for one thing: a stage's trainer and update, and the command and the recipe of a room.
SHARED_NAMES = {"__init__.py", "trainer.py", "update.py", "convert.py", "distill.py", "replay.py"}
MAX_LINES = 450
FORBIDDEN_ROOTS = ("torch", "torchvision", "launch", "configs", "tests")
# These start a backend, or change settings for everybody, when a module is merely imported.
IMPORT_TIME_TRAPS = ("jax.numpy.", "jax.random.", "jax.lax.", "jax.config.", "jax.devices", "jax.local_devices")
LINEN_HOOKS = ("setup",)  # documented by the class, as __call__ is

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))


def module_parts(path: str) -> list[str]:
    """Dotted name of a file, as parts: `qwenla_jax/text/gold.py` -> [qwenla_jax, text, gold]."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_modules(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of whatever is imported anywhere in the file; relative imports are resolved."""
    parts = module_parts(path)
    package = parts if path.endswith("__init__.py") else parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from package import name`: the name may be a module, so it is part of what is imported.
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            target = node.args[0] if node.args else None
            known = isinstance(target, ast.Constant) and isinstance(target.value, str)
            yield node.lineno, target.value if known else "<computed at run time>"


def room_of(parts: list[str]) -> str | None:
    """The room of a dotted name's parts: [qwenla_jax, config, schema, leaves] -> config.schema."""
    return next((name for name in (".".join(parts[1:3]), *parts[1:2]) if name in ROOMS), None)


def import_problems(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Imports that the order of rooms, the ban on torch or the rule of public APIs forbid."""
    parts = module_parts(path)
    top = parts[1:] in ([], ["__main__"])  # gathers the public names of all rooms, or calls the command
    own = room_of(parts)
    if own is None and not top:
        yield 1, f"room {parts[1]!r} has no place in the order"
        return
    for line, name in imported_modules(tree, path):
        root, *rest = name.split(".")
        if root in FORBIDDEN_ROOTS or root.startswith("<"):
            yield line, f"imports {name}"
        elif root != PACKAGE:
            if root != "__future__" and any(part.startswith("_") for part in [root, *rest[:-1]]):
                yield line, f"imports {name}, which is private"
        elif top:
            pass
        elif rest and rest[-1].startswith("_") and not rest[-1].startswith("__"):
            yield line, f"imports {name}, which is private"
        elif own == "cli" and rest in (["__version__"], []):
            pass  # commands are users of the package
        elif (room := room_of([root, *rest])) is None:
            yield line, f"imports {name}, which no room holds"
        elif ROOMS.index(room) > ROOMS.index(own):
            yield line, f"{own} imports {name}, which stands below it"


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of those classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                    if inner.name not in LINEN_HOOKS:
                        yield inner


def signature_problems(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Missing docstrings, missing annotations of public functions."""
    if ast.get_docstring(tree) is None and tree.body:
        yield 1, "the module has no docstring"
    for node in public_functions(tree):
        if ast.get_docstring(node) is None:
            yield node.lineno, f"{node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        untyped = [a.arg for a in args if a and a.annotation is None and a.arg not in ("self", "cls")]
        if untyped or node.returns is None:
            yield node.lineno, f"{node.name} lacks types: {', '.join(untyped) or 'the result'}"


def import_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            defaults = [*child.args.defaults, *child.args.kw_defaults, *getattr(child, "decorator_list", [])]
            for expression in filter(None, defaults):
                yield expression
                yield from import_time_nodes(expression)
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'"):
            yield child
            yield from import_time_nodes(child)


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"jnp": "jax.numpy"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def defines_gradient(node: ast.Expr) -> bool:
    """`f.defvjp(forward, backward)`: a part of f's definition that JAX has no decorator for."""
    return isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(".defvjp")


def side_effect_problems(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Work done at import: bare calls, loops, context managers, arrays; and `global`, which is module state."""
    names = full_names(tree)
    for node in import_time_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await) and not defines_gradient(node):
            yield node.lineno, f"calls {ast.unparse(node.value)[:40]} at import"
        elif isinstance(node, ast.For | ast.While | ast.With):
            yield node.lineno, f"runs a {type(node).__name__.lower()} at import"
        elif isinstance(node, ast.Call):
            head, _, tail = ast.unparse(node.func).partition(".")
            name = names.get(head, head) + (f".{tail}" if tail else "")
            if name.startswith(IMPORT_TIME_TRAPS):
                yield node.lineno, f"calls {name} at import"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"


def problems(source: str, path: str) -> list[str]:
    """All broken rules of one file, each as "path:line: what"."""
    tree = ast.parse(source, path)
    checks = (import_problems, signature_problems, side_effect_problems)
    result = [f"{line}: {what}" for check in checks for line, what in check(tree, path)]
    count = len(source.splitlines())
    if count > MAX_LINES:
        result.append(f"{count}: {count} lines, at most {MAX_LINES}")
    return [f"{path}:{line}" for line in result]


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path):
    result = problems((ROOT / path).read_text(encoding="utf-8"), path)
    assert not result, "\n" + "\n".join(result)


def test_no_file_shares_a_name_for_another_thing():
    names = collections.Counter(PurePosixPath(path).name for path in FILES)
    assert {name for name, count in names.items() if count > 1} == SHARED_NAMES


def test_no_import_circles():
    modules = {".".join(module_parts(path)): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
        named = {name for _, name in imported_modules(tree, path)}
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in named} & set(modules)
        graph[module] -= {module, PACKAGE}  # the package's own names are imported when they are asked for
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph | {"a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()


def test_every_folder_is_a_package():
    # setuptools' `find:` leaves a folder without __init__.py out of the wheel, without a word.
    folders = {PurePosixPath(path).parent for path in FILES}
    missing = [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").is_file()]
    assert not missing, f"no __init__.py in {missing}"


GOOD = '''"""A module."""
import jax.numpy as jnp
from ..text import answers
from .layers import norm
LIMIT = max(1, 2)
def f(x: int) -> int:
    """Doubles."""
    y = jnp.zeros(3)
    print(y)
    return 2 * x
class C:
    """Holds."""
    def setup(self):
        pass
'''


def test_checker_accepts_a_good_file():
    assert problems(GOOD, f"{PACKAGE}/model/a.py") == []


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("text/a.py", "from qwenla_jax.model import layers", "stands below"),
        ("text/a.py", "import qwenla_jax.model.layers", "stands below"),
        ("text/a.py", "from qwenla_jax import model", "stands below"),
        ("text/a.py", "from ..model.layers import norm", "stands below"),
        ("text/a.py", "from .. import model", "stands below"),
        ("text/__init__.py", "from ..model import layers", "stands below"),
        ("config/schema.py", "from ..data import record", "stands below"),
        ("config/checks.py", "from ..train import loop", "stands below"),
        ("text/a.py", "from ..text.answers import _private", "private"),
        ("rewards/a.py", "def _f():\n    from qwenla_jax.train import loop", "stands below"),
        ("text/a.py", "from qwenla_jax import load", "no room holds"),
        ("text/a.py", "import qwenla_jax", "no room holds"),
        ("helpers/a.py", "", "no place"),
        ("model/a.py", "import torch", "imports torch"),
        ("model/a.py", "def _f():\n    from torch.nn import Linear", "imports torch.nn.Linear"),
        ("model/a.py", "import importlib\nX = importlib.import_module('torch')", "imports torch"),
        ("__init__.py", "import torch", "imports torch"),
        ("model/a.py", "from jax._src import core", "private"),
        ("model/a.py", "from launch import train", "imports launch"),
        ("model/a.py", "def f() -> None:\n    pass", "f has no docstring"),
        ("model/a.py", "class C:\n    x = 1", "C has no docstring"),
        ("model/a.py", "class C:\n    '''.'''\n    def g(self) -> None:\n        pass", "g has no docstring"),
        ("model/a.py", "def f(x) -> None:\n    '''.'''", "lacks types: x"),
        ("model/a.py", "def f(x: int):\n    '''.'''", "lacks types: the result"),
        ("model/a.py", "print('hello')", "calls print"),
        ("model/a.py", "import jax\njax.config.update('jax_enable_x64', True)", "at import"),
        ("model/a.py", "import jax.numpy as jnp\nX = 1 + jnp.zeros(3)", "calls jax.numpy.zeros at import"),
        ("model/a.py", "from jax import random\ndef _f(k=random.key(0)):\n    pass", "jax.random.key at import"),
        ("model/a.py", "for i in range(3):\n    X = i", "runs a for"),
        ("model/a.py", "def _f():\n    global X\n    X = 1", "global X"),
        ("model/a.py", "\n" * MAX_LINES, "lines, at most"),
    ],
)
def test_checker_reports(path, line, expected):
    result = problems(f'"""A module."""\n{line}\n', f"{PACKAGE}/{path}")
    assert any(expected in problem for problem in result), result
