"""The user's file: refused where it would start training, imported, and fingerprinted.

Nothing here needs torch, so a changed source is noticed without loading a model.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from droptune.errors import DroptuneError, ProgramError, nearest

_ROOT_MARKS = ("droptune.toml", ".git")
_NOT_OURS = ("site-packages", "dist-packages")  # installed packages may lie under the root

SKELETON = """\
import droptune

program = droptune.classification(
    model={model},
    train=(x, y),  # tensors, arrays, a Dataset, or a function that returns them
    batch_size=128,
    epochs=20,
    optimizer="adamw",
    lr=1e-3,
)"""


def project_root(path: Path) -> Path:
    """The nearest folder above `path` with a droptune.toml or .git, else the file's own folder."""
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, *folder.parents):
        if any((candidate / mark).exists() for mark in _ROOT_MARKS):
            return candidate
    return folder


@dataclass(frozen=True)
class Reference:
    """`file.py[:name]` or `package.module[:name]`, found under the project's root."""

    text: str
    path: Path
    name: str | None
    root: Path
    module: str | None  # the dotted name, where one was given

    @classmethod
    def parse(cls, text: str, root: Path) -> Reference:
        root = root.resolve()
        target, _, name = text.partition(":")
        if target.endswith(".py"):
            path, module = (root / target).resolve(), None
        else:
            module = target
            path = _module_path(target, root, text)
        if not path.is_relative_to(root):
            raise ProgramError(
                f"program {text} lies outside the project {root}: "
                "move it there, or put a droptune.toml into the folder above both"
            )
        if not path.is_file():
            beside = (p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else ()
            raise ProgramError(f"no program file {path}{nearest(path.name, beside)}")
        return cls(text, path, name or None, root, module)


def _module_path(module: str, root: Path, text: str) -> Path:
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ProgramError(f"program {text!r}: give file.py[:name] or package.module[:name]")
    found = _find(module, [root])
    if found is None:
        raise ProgramError(
            f"no module {module} under {root}: give file.py[:name] or package.module[:name]"
        )
    return found


def _find(module: str, folders: list[Path]) -> Path | None:
    """The source of a module in one of the folders."""
    for folder in folders:
        stem = folder.joinpath(*module.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


# --- reading without running ----------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A source file, parsed but not run."""

    path: Path
    tree: ast.Module

    @classmethod
    def read(cls, path: Path) -> Text:
        try:
            return cls(path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
        except SyntaxError as error:
            raise ProgramError(f"{path}:{error.lineno}: SyntaxError: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise ProgramError(f"{path} is not text in UTF-8: give a Python file") from error

    @property
    def models(self) -> tuple[str, ...]:
        """The classes that look like an nn.Module, in order of the file."""
        found: list[str] = []
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                if bases & {"Module", "Sequential", *found}:
                    found.append(node.name)
        return tuple(found)

    @property
    def skeleton(self) -> str:
        """What to write, with the file's own model where it has one."""
        return SKELETON.format(model=self.models[-1] if self.models else "Net")

    def training_line(self) -> int | None:
        """The line that would start training when the file is imported."""
        trains = _functions_that_train(self.tree)
        for statement in self.tree.body:
            if _is_main_guard(statement) or isinstance(statement, _DEFINITIONS):
                continue
            for node in _outside_definitions(statement):
                if isinstance(node, ast.Call) and _trains(node, trains):
                    return node.lineno
        return None


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Calls that train, by the words one of which their owner's name holds ("" is in every name).
_TRAINING_CALLS = {
    "backward": ("",),
    "step": ("",),
    "fit": ("trainer", "model", "net", "learner"),
    "train": ("trainer",),
    "optimize": ("study",),
}


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _outside_definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what runs with it: bodies of functions and lambdas run later."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*_DEFINITIONS, ast.Lambda)):
            yield from _outside_definitions(child)


def _trains(call: ast.Call, functions: set[str]) -> bool:
    """Whether a call is `loss.backward()`, `optimizer.step()`, `trainer.fit(…)` or leads there."""
    if isinstance(call.func, ast.Name):
        return call.func.id in functions
    if not isinstance(call.func, ast.Attribute):
        return False
    owner = ast.unparse(call.func.value).lower()
    return any(word in owner for word in _TRAINING_CALLS.get(call.func.attr, ()))


def _functions_that_train(tree: ast.Module) -> set[str]:
    """Functions of the file that train, directly or through one another."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: set[str] = set()
    while True:
        more = {
            name
            for name, node in functions.items()
            if name not in found
            and any(isinstance(n, ast.Call) and _trains(n, found) for n in ast.walk(node))
        }
        if not more:
            return found
        found |= more


# --- running it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A user's module, imported."""

    reference: Reference
    text: Text
    module: ModuleType

    @property
    def where(self) -> str:
        return str(self.reference.path)


def import_source(text: str, root: Path) -> Source:
    """Imports what a reference names; its folder and the root are on `sys.path` from then on.

    Raises ProgramError: no such file, one that would train, or whatever the file itself raises.
    """
    reference = Reference.parse(text, root)
    read = Text.read(reference.path)
    line = read.training_line()
    if line is not None:
        raise ProgramError(
            f"{reference.path}:{line} would start training when the file is imported: put the loop "
            'under `if __name__ == "__main__":` and give droptune the model and the data:\n\n'
            f"{read.skeleton}"
        )
    return Source(reference, read, _import(reference))


def _import(reference: Reference) -> ModuleType:
    for folder in (reference.root, reference.path.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        if reference.module is not None:
            return importlib.import_module(reference.module)
        return _import_file(reference.path)
    except DroptuneError as error:
        raise ProgramError(f"{_blame(error, reference)}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ProgramError(
            f"{_blame(error, reference)}: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    content = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"{path.stem}_{content}"  # never the name of an installed module
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ProgramError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _blame(error: BaseException, reference: Reference) -> str:
    """file:line of the innermost frame in the project's own files."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_ours(Path(frame.filename), reference.root):
            return f"{frame.filename}:{frame.lineno}"
    return str(reference.path)


@contextlib.contextmanager
def blamed(what: str) -> Iterator[None]:
    """Whatever the user's code raises within, as a ProgramError in one line with its place."""
    try:
        yield
    except DroptuneError:
        raise
    except Exception as error:
        raise ProgramError(f"{what} failed: {told(error)}") from error


def told(error: BaseException) -> str:
    """`file:line: Type: message` of what a user's code raised, in one line; the place is the
    innermost that neither Python, nor an installed package, nor droptune holds."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename[:1] != "<" and not _is_installed(Path(f.filename))]
    place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"{place}{type(error).__name__}: {_first_line(error)}"


def _is_installed(path: Path) -> bool:
    within = (Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib")))
    return any(part in _NOT_OURS for part in path.parts) or any(map(path.is_relative_to, within))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _is_ours(path: Path, root: Path) -> bool:
    """Whether a source belongs to the project: under its root, not installed, not droptune."""
    return path.is_relative_to(root) and not _is_installed(path)


def pick(source: Source, fits: Callable[[Any], bool], wanted: str) -> Any:
    """The value in the module that was named, else the one called `program`, else the only fit.

    Raises ProgramError with the skeleton to write where nothing fits, with the names where
    several do.
    """
    values = vars(source.module)
    name = source.reference.name
    if name is not None:
        if name not in values:
            public = [n for n in values if not n.startswith("_")]
            raise ProgramError(f"{source.where} has no {name!r}{nearest(name, public)}")
        return values[name]
    if fits(values.get("program")):
        return values["program"]
    own = {n: value for n, value in values.items() if fits(value) and defined_in(value, source)}
    if len(own) == 1:
        return next(iter(own.values()))
    if own:
        raise ProgramError(
            f"{source.where} has several: {', '.join(own)}; name one: "
            f"{source.reference.text}:{next(iter(own))}"
        )
    raise ProgramError(f"{source.where} has no {wanted}: write one:\n\n{source.text.skeleton}")


def defined_in(value: Any, source: Source) -> bool:
    """Not merely imported there."""
    home = getattr(value, "__module__", source.module.__name__)
    return not isinstance(value, type) or home == source.module.__name__


# --- the fingerprint ------------------------------------------------------------------------


def fingerprint(reference: str, root: Path) -> dict[str, str]:
    """SHA-256 of the program's file and of all it imports from under the root, by relative path.

    Follows `import` statements (also those inside functions) without running anything, so that
    every process finds the same files.
    """
    start = Reference.parse(reference, root)
    found: dict[str, str] = {}
    waiting = [start.path]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(start.root).as_posix()
        if name in found:
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        waiting += [p for p in _imported(path, start) if _is_ours(p, start.root)]
    return dict(sorted(found.items()))


def _imported(path: Path, start: Reference) -> Iterator[Path]:
    for node in ast.walk(Text.read(path).tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            folders = [start.path.parent, start.root]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
            folders = [start.path.parent, start.root]
            if node.level:
                folders = [path.parents[node.level - 1]]
        else:
            continue
        for name in filter(None, names):
            yield from _with_packages(name, folders)


def _with_packages(module: str, folders: list[Path]) -> Iterator[Path]:
    """The module's source and those of the packages around it, which run first."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = _find(".".join(parts[:end]), folders)
        if path is not None:
            yield path.resolve()
