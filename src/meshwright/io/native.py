"""The native file door: every noun is one JSON object that starts with its schema, `"schema": "strategy/1"`.

One canonical form (fields in order, dict keys sorted, shortest floats, two spaces) makes files comparable byte by byte,
and a record's fingerprint is the hash of that form. Reading is strict, names all faults at once, upgrades files of
older versions, and raises nothing but `InputError`. Nothing in a file is ever executed.

This is the only module that imports pydantic, and only when a file is read or written: the nouns stay plain frozen
dataclasses. pydantic hands its configuration down to nested standard dataclasses as long as the root of the type is not
one itself, hence the `tuple[record]` in `_adapter`. Formats of other tools are not here; they have their own doors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import numbers
import os
import re
import reprlib
import secrets
import stat
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.cluster import Cluster, cluster_problems
from meshwright.engine import Engine, engine_problems
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph, graph_problems
from meshwright.plan import Plan
from meshwright.profile import Profile, profile_problems
from meshwright.registry import Registry
from meshwright.results import Estimate, Measurement
from meshwright.strategy import Strategy
from meshwright.units import MiB, format_bytes
from meshwright.workload import Workload, workload_problems

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

MAX_FILE_BYTES = 64 * MiB
MAX_DEPTH = 100  # below the 200 levels that pydantic's parser takes, and far above any noun
MAX_PROBLEMS = 100
MAX_INT = 2**63 - 1  # what a NumPy column holds

KeyPath = tuple[str | int, ...]
Json = dict[str, Any]


@dataclass(frozen=True)
class Noun:
    """A kind of file: its name and newest version, the dataclass it holds, and how to read older versions.

    `check` returns what the types cannot say (sums, references between fields). `upgrades[n]` turns the fields of a
    version-n file into those of version n + 1; each older version needs one, so that no file is ever orphaned.
    """

    name: str
    version: int
    record: type
    check: Callable[[Any], list[Problem]] | None = None
    upgrades: Mapping[int, Callable[[Json], Json]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert is_dataclass(self.record), f"{self.name} needs a dataclass"
        assert "schema" not in {f.name for f in fields(self.record)}, f"{self.name}: the key 'schema' is the file's own"
        assert sorted(self.upgrades) == list(range(1, self.version)), f"{self.name}: one upgrade per older version"

    @property
    def schema(self) -> str:
        """What newly written files of this noun carry under `schema`."""
        return f"{self.name}/{self.version}"


NOUNS = Registry[Noun]("noun")


def register(noun: Noun) -> None:
    """Make a noun readable and writable under its name."""
    NOUNS.add(noun.name, noun)


def _engine_2(old: Json) -> Json:
    """What an engine holds in memory is a record of its own."""
    rest = {key: value for key, value in old.items() if key != "reserved_bytes"}
    return {**rest, "memory": {"reserved_bytes": old["reserved_bytes"]}} if "reserved_bytes" in old else rest


register(Noun("graph", 1, Graph, graph_problems))
register(Noun("cluster", 1, Cluster, cluster_problems))
register(Noun("workload", 1, Workload, workload_problems))
register(Noun("strategy", 1, Strategy))  # its rules need a graph and a cluster: `strategy_problems` is the caller's
register(Noun("engine", 2, Engine, engine_problems, {1: _engine_2}))
register(Noun("estimate", 1, Estimate))
register(Noun("measurement", 1, Measurement))
register(Noun("plan", 1, Plan))
register(Noun("profile", 1, Profile, profile_problems))


# --- records to text ------------------------------------------------------------------------------------------------


def dumps(record: Any) -> str:
    """The canonical text of a record of a registered noun.

    Raises `InputError` where the record's values do not have the types its fields declare (NaN and infinity included):
    what is written can always be read back.
    """
    return json.dumps(_document(record), indent=2, ensure_ascii=False) + "\n"


def fingerprint(record: Any) -> str:
    """SHA-256 (hex) of the record's canonical form in compact separators; equal records have equal fingerprints."""
    compact = json.dumps(_document(record), separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(compact.encode()).hexdigest()


def write(record: Any, path: str | Path) -> None:
    """Write `record` to `path` whole or not at all; `-` is stdout."""
    write_text(dumps(record), path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file whole or not at all; `-` is stdout. Raises `InputError` where it cannot be written."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: str | Path) -> None:
    """Like `write_text`."""
    if str(path) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        _write_atomically(content, os.path.realpath(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError([Problem(str(path), "", f"cannot be written: {reason_of(error)}")]) from error


def _write_atomically(content: bytes, path: str) -> None:
    mode = None
    if os.path.exists(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # /dev/null and pipes are written to, never replaced
            Path(path).write_bytes(content)
            return
    beside = os.path.join(os.path.dirname(path), f".meshwright-{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            if mode is not None:
                os.chmod(beside, stat.S_IMODE(mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _document(record: Any) -> Json:
    noun = next((noun for noun in NOUNS.values() if noun.record is type(record)), None)
    assert noun is not None, f"{type(record).__name__} is not the record of a registered noun"
    # Through the reader's eyes once, so that an int in a float field is written as the float that will be read.
    normal = _validated(noun, _plain(record), noun.name)
    return {"schema": noun.schema, **_plain(normal)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {_key(key): _plain(value[key]) for key in sorted(value, key=_key)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # of an enum member its value
        return str.__str__(value)
    if isinstance(value, numbers.Integral):  # NumPy scalars too
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} has no place in a file")


def _key(key: object) -> str:
    return str.__str__(key) if isinstance(key, str) else str(key)


# --- text to records ------------------------------------------------------------------------------------------------


def read(path: str | Path, expected: str) -> Any:
    """The record in the file at `path` (`-` is stdin), which must be of the noun named `expected`."""
    return from_object(read_json_object(path, f"{_article(expected)} file"), expected, _where(path))


def loads(text: str | bytes, expected: str, where: str = "input") -> Any:
    """The record in `text`; `where` is how errors call the place that the text came from."""
    return from_object(parse_json_object(text, f"{_article(expected)} file", where), expected, where)


def read_json_object(path: str | Path, what: str) -> Json:
    """The JSON object in any file (`-` is stdin), after the checks that need no schema; `what` says what was expected.

    Refused: files that are missing, unreadable, larger than 64 MiB, not UTF-8, not one JSON object, nested more than
    100 deep, and those with duplicate keys or with numbers that JSON or a float does not know.
    """
    return parse_json_object(content_of(path), what, _where(path))


def parse_json_object(text: str | bytes, what: str, where: str) -> Json:
    """The JSON object in `text`, after the same checks as `read_json_object`.

    >>> parse_json_object('{"tp": 8, "tp": 4}', "a strategy file", "s.json")
    Traceback (most recent call last):
    meshwright.errors.InputError: s.json: the key 'tp' stands twice in one object
    """
    decoded = _decoded(text, what, where)
    problems: list[Problem] = []

    def once(pairs: list[tuple[str, Any]]) -> Json:
        seen: Json = {}
        for key, value in pairs:
            if key in seen:
                problems.append(Problem(where, "", f"the key {shown(key)} stands twice in one object"))
            seen[key] = value
        return seen

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            problems.append(Problem(where, _shorten(number), "a finite number is expected"))
        return value

    try:
        data = json.loads(decoded, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
        too_deep = _deeper_than(data, MAX_DEPTH)
    except json.JSONDecodeError as error:
        raise InputError([Problem(where, "", _syntax_rule(error))]) from error
    except RecursionError:
        too_deep = True
    except ValueError as error:  # CPython's limit on the digits of one integer
        raise InputError([Problem(where, "", "no number may have more than 4300 digits")]) from error
    if too_deep:
        raise InputError([Problem(where, "", f"is nested more than {MAX_DEPTH} levels deep")])
    if not isinstance(data, dict):
        problems.append(Problem(where, shown(data), f"{what} holds one JSON object"))
    if re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", decoded):
        problems.extend(_lone_surrogates(data, where))
    refuse(problems, where)
    return typing.cast(Json, data)


def content_of(path: str | Path) -> bytes:
    """At most `MAX_FILE_BYTES` of a file; read by that limit also where the size is unknown before (pipes)."""
    where = _where(path)
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise InputError([Problem(where, "", f"has {format_bytes(size)}; {_SIZE_RULE}")])
                content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError([Problem(where, "", "there is no such file", nearest_file(Path(path)))]) from error
    except IsADirectoryError as error:
        raise InputError([Problem(where, "", "is a folder; a file is expected")]) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError([Problem(where, "", f"cannot be read: {reason_of(error)}")]) from error
    if len(content) > MAX_FILE_BYTES:
        raise InputError([Problem(where, "", f"is longer than allowed; {_SIZE_RULE}")])
    return content


_SIZE_RULE = f"{format_bytes(MAX_FILE_BYTES)} is the most that is read"


def nearest_file(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.R_OK):
        return None
    name = nearest_name(path.name, sorted(os.listdir(folder)))
    return str(folder / name) if name else None


def _decoded(text: str | bytes, what: str, where: str) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")  # Windows editors put a byte-order mark in front
        except UnicodeDecodeError as error:
            rule = f"is not UTF-8 text (byte {error.start}); {what} is a JSON text"
            raise InputError([Problem(where, "", rule)]) from error
    if not text.strip():
        raise InputError([Problem(where, "", f"is empty; {what} holds one JSON object")])
    return text


def _syntax_rule(error: json.JSONDecodeError) -> str:
    rule = f"is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    cut_off = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    return f"{rule}; the file seems to be cut off" if cut_off else rule


def _deeper_than(data: Any, limit: int) -> bool:
    level = [data]  # level by level, since recursion is what deep nesting breaks
    for _ in range(limit + 1):
        parents = [node for node in level if isinstance(node, dict | list) and node]
        if not parents:
            return False
        level = [child for node in parents for child in (node.values() if isinstance(node, dict) else node)]
    return True


def _lone_surrogates(data: Any, where: str) -> list[Problem]:
    """Half characters: JSON can spell them, UTF-8 cannot hold them."""
    return [
        Problem(_place(where, path), shown(leaf), "a lone surrogate is not a character")
        for path, leaf in _leaves(data)
        if any(isinstance(text, str) and re.search(r"[\ud800-\udfff]", text) for text in (*path, leaf))
    ]


def _leaves(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(data, dict | list):
        for key, child in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _leaves(child, (*path, key))
    else:
        yield path, data


def from_object(data: Json, expected: str, where: str) -> Any:
    """The record in a JSON object that `read_json_object` gave."""
    noun = NOUNS[expected]
    version = _version(data, noun, where)
    content = {key: value for key, value in data.items() if key != "schema"}
    for older in range(version, noun.version):
        content = _upgraded(content, noun, older, where)
    record = _validated(noun, content, where)
    if noun.check:
        refuse([within(problem, where) for problem in noun.check(record)], where)
    return record


def _version(data: Json, noun: Noun, where: str) -> int:
    place, value = _place(where, ("schema",)), data.get("schema")
    if "schema" not in data:
        near = nearest_name("schema", data)
        raise InputError([Problem(place, "", f"missing; {_article(noun.name)} file has {noun.schema!r} here", near)])
    match = re.fullmatch(r"([a-z][a-z0-9_-]*)/([1-9][0-9]{0,5})", value) if isinstance(value, str) else None
    if match is None or match[1] != noun.name:
        of = f"this is {_article(match[1])} file; " if match and match[1] in NOUNS else ""
        raise InputError([Problem(place, shown(value), f"{of}{_article(noun.name)} is expected", repr(noun.schema))])
    if int(match[2]) > noun.version:
        rule = f"written by a newer Meshwright; this one reads up to {noun.schema!r}: update it"
        raise InputError([Problem(place, shown(value), rule)])
    return int(match[2])


def _upgraded(content: Json, noun: Noun, older: int, where: str) -> Json:
    try:
        return noun.upgrades[older](content)
    except InputError as error:
        raise _refusal([within(problem, where) for problem in error.problems], where) from error
    except Exception as error:  # an upgrade reads unchecked content: whatever it trips over is the file's fault
        reason = f"{type(error).__name__}: {_shorten(str(error))}"
        raise InputError([Problem(where, "", f"is not a valid {noun.name}/{older} file ({reason})")]) from error


# --- validation -----------------------------------------------------------------------------------------------------


def json_schema(noun: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the newest version of a noun's file; descriptions are the docstrings."""
    registered = NOUNS[noun]
    schema = _adapter(registered.record, docstrings=True).json_schema()
    reference = schema["prefixItems"][0]["$ref"]
    name = reference.rsplit("/", 1)[1]
    definitions = schema["$defs"]
    record = definitions[name]
    if json.dumps(schema).count(f'"{reference}"') == 1:  # the record does not contain itself
        del definitions[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": registered.name,
        **{key: record[key] for key in ("description",) if key in record},
        "type": "object",
        "properties": {"schema": {"const": registered.schema}, **record["properties"]},
        "required": ["schema", *record.get("required", [])],
        "additionalProperties": False,
        **({"$defs": definitions} if definitions else {}),
    }


@functools.cache
def _adapter(record: type, docstrings: bool = False) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=docstrings)
    return TypeAdapter(tuple[record], config=config)  # type: ignore[valid-type]


def _validated(noun: Noun, content: Json, where: str) -> Any:
    """The record that `content` describes. pydantic is strict *and* takes lists for tuples only when it reads JSON."""
    from pydantic import ValidationError

    text = json.dumps([content])
    try:
        (record,) = _adapter(noun.record).validate_json(text)
    except ValidationError as error:
        raise _refusal(_translated(error.errors(include_url=False), noun.record, content, where), where) from error
    except InputError as error:  # raised by a record's own __post_init__
        raise _refusal([within(problem, where) for problem in error.problems], where) from error
    if re.search(r"[0-9]{19}", text):
        refuse(_too_large_integers(record, where), where)
    return record


def _too_large_integers(record: Any, where: str) -> list[Problem]:
    return [
        Problem(_place(where, path), shown(leaf), "an integer of at most 2^63 - 1 in magnitude is expected")
        for path, leaf in _leaves(_plain(record))
        if isinstance(leaf, int) and abs(leaf) > MAX_INT
    ]


@dataclass(frozen=True)
class _Fault:
    """pydantic's error at `path`; `members` are the union members tried on the way: (length of the path there, tag)."""

    path: KeyPath
    members: tuple[tuple[int, str | int], ...]
    error: ErrorDetails


def _translated(errors: Sequence[ErrorDetails], record: type, content: Json, where: str) -> list[Problem]:
    by_path: dict[KeyPath, list[_Fault]] = {}
    for fault in _one_member_per_union([_fault(error, content) for error in errors]):
        by_path.setdefault(fault.path, []).append(fault)
    return [_problem(path, faults, record, where) for path, faults in by_path.items()]


def _fault(error: ErrorDetails, content: Any) -> _Fault:
    """Part pydantic's location into the steps that exist in the content and the union members it tried."""
    path: list[str | int] = []
    members: list[tuple[int, str | int]] = []
    steps = error["loc"][1:]  # without the index in `tuple[record]`
    for position, step in enumerate(steps):
        inside = step in content if isinstance(content, dict) else False
        if isinstance(content, list) and isinstance(step, int):
            inside = step < len(content)
        if inside:
            content = content[step]
            path.append(step)
        elif error["type"] == "missing" and position == len(steps) - 1:
            path.append(step)
        elif step != "[key]":
            members.append((len(path), step))
    return _Fault(tuple(path), tuple(members), error)


def _one_member_per_union(faults: list[_Fault]) -> list[_Fault]:
    """Of a union only the member that the writer seems to have meant; all members where none fits at all."""
    kept = [fault for fault in faults if not fault.members]
    unions: dict[KeyPath, dict[str | int, list[_Fault]]] = {}
    for fault in faults:
        if fault.members:
            (length, tag), rest = fault.members[0], fault.members[1:]
            tried = unions.setdefault(fault.path[:length], {})
            tried.setdefault(tag, []).append(_Fault(fault.path, rest, fault.error))
    for point, tried in unions.items():
        entered = [found for found in tried.values() if all(len(fault.path) > len(point) for fault in found)]
        if not entered:
            kept += [fault for found in tried.values() for fault in _one_member_per_union(found)]
            continue
        best = min(entered, key=lambda found: (len(_wrong_kinds(found)), len(found)))
        if _wrong_kinds(best):  # no member has this `kind`: say all kinds that there are
            kept += [fault for found in entered for fault in _wrong_kinds(found)]
        else:
            kept += _one_member_per_union(best)
    return kept


def _wrong_kinds(faults: Iterable[_Fault]) -> list[_Fault]:
    return [fault for fault in faults if fault.error["type"] == "literal_error"]


_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "none_required": "null",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
}


def _problem(path: KeyPath, faults: Sequence[_Fault], record: type, where: str) -> Problem:
    error = faults[0].error
    value, place = error["input"], _place(where, path)
    if error["type"] == "missing":
        return Problem(place, "", "missing")
    if error["type"] == "unexpected_keyword_argument":
        known = _field_names(record, path[:-1])
        rule = f"unknown key; known: {', '.join(known)}"
        return Problem(place, shown(value), rule, nearest_name(str(path[-1]), known))
    expected = list(dict.fromkeys(phrase for fault in faults for phrase in _expected(fault.error)))
    own_words = error["msg"].removeprefix("Value error, ")  # of a ValueError in a __post_init__, and of rarer rules
    rule = f"{' or '.join(expected)} is expected" if expected else own_words
    choices = [phrase[1:-1] for phrase in expected if phrase.startswith("'")]
    near = nearest_name(value, choices) if isinstance(value, str) else None
    return Problem(place, shown(value), rule, repr(near) if near else None)


def _expected(error: ErrorDetails) -> list[str]:
    """What pydantic would have taken, in words; of an enum or a Literal the quoted values."""
    if error["type"] in ("enum", "literal_error"):
        return re.split(r", | or ", error["ctx"]["expected"])
    if error["type"] == "too_long":
        return [f"a list of {error['ctx']['max_length']}"]
    return [_EXPECTED[error["type"]]] if error["type"] in _EXPECTED else []


def _field_names(type_: Any, path: KeyPath) -> list[str]:
    """The keys that the type allows at `path`; all members' where a union stands there."""
    if is_dataclass(type_):
        hints = typing.get_type_hints(type_)
        if path:
            return _field_names(hints[path[0]], path[1:]) if path[0] in hints else []
        return [f.name for f in fields(type_) if f.init]
    if typing.get_origin(type_) in (tuple, list, dict):
        path = path[1:]
    return list(dict.fromkeys(name for member in typing.get_args(type_) for name in _field_names(member, path)))


# --- words ----------------------------------------------------------------------------------------------------------


def _where(path: str | Path) -> str:
    return "stdin" if str(path) == "-" else str(path)


def _place(where: str, path: KeyPath) -> str:
    """File and key path: `file.json: groups[0].count`."""
    text = "".join(
        f".{key}" if isinstance(key, str) and re.fullmatch(r"[\w-]{1,60}", key) else f"[{shown(key)}]" for key in path
    )
    return f"{where}: {text.removeprefix('.')}" if path else where


def within(problem: Problem, where: str) -> Problem:
    place = f"{where}: {problem.where}" if problem.where else where
    return Problem(place, problem.value, problem.rule, problem.nearest)


def _refusal(problems: list[Problem], where: str) -> InputError:
    more = len(problems) - MAX_PROBLEMS
    rest = [Problem(where, "", f"and {more:,} more problems")] if more > 0 else []
    return InputError(problems[:MAX_PROBLEMS] + rest)


def refuse(problems: list[Problem], where: str) -> None:
    if problems:
        raise _refusal(problems, where)


def _article(noun: str) -> str:
    return f"{'an' if noun[:1] in tuple('aeiou') else 'a'} {noun}"


def reason_of(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2
shown = _SHORT.repr
