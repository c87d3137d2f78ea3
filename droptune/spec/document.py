"""A YAML document, and frozen values checked against it: errors in one line with its place."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from droptune.errors import SpecError, nearest

T = TypeVar("T")
Place = tuple[str | int, ...]  # keys and indices from the document's top
Reason = Callable[[Place], str | None]  # why a key is refused, where more than "unknown" is known


class Strict:
    """Unknown keys are refused."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """Safe YAML, with 1e-3 a number (YAML 1.1 wants 1.0e-3) and no key twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r} twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


@dataclass(frozen=True)
class Document:
    """What a file says, and on which lines."""

    path: Path
    content: dict[str, Any]
    lines: Mapping[Place, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Raises SpecError: no such file, or no YAML with keys at its top."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
            hint = nearest(path.name, [p.name for p in beside])
            raise SpecError(
                f"no study file {path}{hint}; write one with: droptune study init PROGRAM"
            ) from None
        except OSError as error:
            raise SpecError(f"cannot read {path}: {error.strerror}; give a YAML file") from error
        except UnicodeDecodeError as error:
            raise SpecError(f"{path} is no text in UTF-8; a study file is YAML") from error
        try:
            content = yaml.load(text, _Loader)
            lines = dict(_lines(yaml.compose(text, _Loader), ()))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f":{mark.line + 1}"
            problem = getattr(error, "problem", None) or "not valid YAML"
            if "'\\t'" in problem:
                problem = "a tab: YAML is indented with spaces"
            raise SpecError(f"{path}{line}: {problem}") from error
        if not isinstance(content, dict):
            raise SpecError(f"{path} holds no keys: a study file starts with `program: file.py`")
        return cls(path, content, lines)

    def at(self, place: Place) -> str:
        """`file.yaml:12`: the line of the place, or of the nearest key around it."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return f"{self.path}:{self.lines[place[:end]]}"
        return str(self.path)

    def located(self, error: SpecError) -> SpecError:
        """The error with the line of what its text begins with, as `space.rates: 'fc1' …` does."""
        found = re.match(r"([\w.]*)(?:: '([^']+)')?", str(error))
        assert found is not None
        place = (*found[1].split("."), *filter(None, [found[2]]))
        return SpecError(f"{self.at(place)}: {error}")


def _lines(node: yaml.Node | None, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _lines(value, (*place, index))


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's reader and writer of a kind of value; built once."""
    return TypeAdapter(kind)


def checked(
    kind: type[T],
    content: Mapping[str, Any],
    document: Document | None = None,
    reason: Reason = lambda place: None,
) -> T:
    """`content` as a value of `kind`. Raises SpecError: the first fault, in one line."""
    try:
        value: T = adapter(cast(Any, kind)).validate_python(content)
        return value
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # an unknown key explains the faults that follow from it
        fault = next((f for f in faults if f["type"] == "unexpected_keyword_argument"), faults[0])
        place = _written(fault["loc"], content)
        where = "" if document is None else f"{document.at(place)}: "
        same = [f for f in faults if _written(f["loc"], content) == place]  # of union branches
        elsewhere = len({_written(f["loc"], content) for f in faults} - {place})
        more = f" (and {elsewhere} more)" if elsewhere else ""
        raise SpecError(f"{where}{_message(kind, same, place, reason)}{more}") from None


def _written(loc: Place, content: Any) -> Place:
    """The part of pydantic's location that is written in the file: no names of union branches."""
    place: list[str | int] = []
    for step in loc:
        inside = isinstance(content, Mapping) and step in content
        if inside or (isinstance(content, list | tuple) and isinstance(step, int)):
            place.append(step)
            content = content[step]
    if loc and (not place or place[-1] != loc[-1]) and isinstance(content, Mapping):
        place.append(loc[-1])  # a key that is missing
    return tuple(place)


def _message(kind: type, faults: Sequence[Any], place: Place, reason: Reason) -> str:
    fault = faults[0]
    dotted = ".".join(map(str, place)) or "the file"
    if fault["type"] == "unexpected_keyword_argument":
        why = reason(place)
        if why is not None:
            return f"{dotted}: {why}"
        return f"unknown key {dotted}{nearest(str(place[-1]), _keys_at(kind, place[:-1]))}"
    if fault["type"] == "missing":
        return f"{dotted} is missing"
    texts = dict.fromkeys(_own_words(f["msg"]) for f in faults)
    given = "" if fault["type"] == "value_error" else f", got {fault['input']!r}"
    return f"{dotted}: {' or '.join(texts)}{given}"


def _own_words(message: str) -> str:
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    kinds = re.sub(r"a dictionary or an instance of \w+", "keys and values", message)
    kinds = kinds.replace("a valid tuple", "a list")
    return kinds[:1].lower() + kinds[1:]


def _keys_at(kind: Any, place: Place) -> list[str]:
    """The keys that the value at `place` may have."""
    kinds = list(_dataclasses_in(kind))
    if not place:
        return [_alias(f, hints) for k in kinds for f, hints in _fields(k)]
    for k in kinds:
        for f, hints in _fields(k):
            if _alias(f, hints) == place[0]:
                rest = place[1:]
                while rest and not _has_key(hints[f.name], rest[0]):
                    rest = rest[1:]  # an index, or a key of the user's own
                return _keys_at(hints[f.name], rest)
    return []


def _has_key(kind: Any, key: str | int) -> bool:
    return any(_alias(f, h) == key for k in _dataclasses_in(kind) for f, h in _fields(k))


def _fields(kind: Any) -> Iterator[tuple[dataclasses.Field[Any], dict[str, Any]]]:
    hints = get_type_hints(kind, include_extras=True)
    for each in dataclasses.fields(kind):
        yield each, hints


def _alias(each: dataclasses.Field[Any], hints: Mapping[str, Any]) -> str:
    for extra in getattr(hints[each.name], "__metadata__", ()):
        if getattr(extra, "alias", None):
            return str(extra.alias)
    return each.name


def _dataclasses_in(kind: Any) -> Iterator[Any]:
    """The dataclasses that an annotation allows."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield kind
    elif get_origin(kind) is Annotated:
        yield from _dataclasses_in(get_args(kind)[0])
    else:
        for part in get_args(kind):
            yield from _dataclasses_in(part)
