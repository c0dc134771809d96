"""The native file door: exact round trips, and every bad file ends in an `InputError` that helps."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster import preset_cluster, preset_names
from meshwright.errors import InputError, Problem
from meshwright.io import native
from meshwright.io.native import Noun, dumps, fingerprint, json_schema, loads, read, read_json_object, write
from meshwright.registry import Registry

REAL_NOUNS = native.NOUNS


class Color(StrEnum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True)
class Switch:
    ports: int
    kind: Literal["switch"] = "switch"


@dataclass(frozen=True)
class Ring:
    size: int
    kind: Literal["ring"] = "ring"


@dataclass(frozen=True)
class Group:
    """Equal devices."""

    count: int
    peak_flops: float
    """FLOP/s of one device."""
    color: Color = Color.RED
    shape: tuple[int, float] = (1, 1.0)


@dataclass(frozen=True)
class Toy:
    """A small noun that has one of everything."""

    name: str
    groups: tuple[Group, ...]
    link: Switch | Ring
    note: str | None = None
    shared: bool = False
    degree: int | str = "auto"
    prices: dict[str, float] = field(default_factory=dict)
    nested: dict[Color, tuple[Switch | Ring, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "forbidden":
            raise ValueError("this name is taken")


@dataclass(frozen=True)
class Other:
    size: int


def check_toy(toy: Toy) -> list[Problem]:
    wrong = [index for index, group in enumerate(toy.groups) if group.count < 1]
    return [Problem(f"groups[{index}].count", str(toy.groups[index].count), "must be at least 1") for index in wrong]


def upgrade_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had `title` for `name` and one group only."""
    return {**{key: content[key] for key in content if key not in ("title", "group")}} | {
        "name": content["title"],
        "groups": [content["group"]],
    }


@pytest.fixture(autouse=True, scope="module")
def _toy_nouns() -> Iterator[None]:
    """The toys live in a registry of their own, so that other tests see only the real nouns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "NOUNS", Registry[Noun]("noun"))
        native.register(Noun("toy", 2, Toy, check_toy, {1: upgrade_1}))
        native.register(Noun("other", 1, Other))
        yield


TOY = Toy(
    name="größe",
    groups=(Group(8, 1e15), Group(2, 0.1, Color.GREEN, (3, 2.5))),
    link=Ring(4),
    prices={"b": 2.0, "a": 1e-7},
    nested={Color.RED: (Switch(2), Ring(3))},
)
VALID = """\
{
  "schema": "toy/2",
  "name": "größe",
  "groups": [
    {
      "count": 8,
      "peak_flops": 1000000000000000.0,
      "color": "red",
      "shape": [
        1,
        1.0
      ]
    },
    {
      "count": 2,
      "peak_flops": 0.1,
      "color": "green",
      "shape": [
        3,
        2.5
      ]
    }
  ],
  "link": {
    "size": 4,
    "kind": "ring"
  },
  "note": null,
  "shared": false,
  "degree": "auto",
  "prices": {
    "a": 1e-07,
    "b": 2.0
  },
  "nested": {
    "red": [
      {
        "ports": 2,
        "kind": "switch"
      },
      {
        "size": 3,
        "kind": "ring"
      }
    ]
  }
}
"""
SMALL: dict[str, Any] = {
    "schema": "toy/2",
    "name": "t",
    "groups": [{"count": 1, "peak_flops": 1}],
    "link": {"size": 1, "kind": "ring"},
}


def refusal(text: str | bytes, expected: str = "toy") -> str:
    with pytest.raises(InputError) as caught:
        loads(text, expected, "t.json")
    return str(caught.value)


def refusal_of(**changes: Any) -> str:
    return refusal(json.dumps({**SMALL, **changes}))


# --- what is written ------------------------------------------------------------------------------------------------


def test_canonical_text() -> None:
    assert dumps(TOY) == VALID


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    write(TOY, path)
    assert path.read_bytes() == VALID.encode()
    assert read(path, "toy") == TOY
    assert dumps(read(path, "toy")) == VALID


def test_equal_records_have_equal_text_and_fingerprint() -> None:
    # An int in a float field, NumPy scalars and another order of dict keys are the same record.
    count_8: Any = np.int64(8)
    same = replace(
        TOY,
        groups=(Group(count_8, 10**15), TOY.groups[1]),
        prices={"a": np.float64(1e-7), "b": 2},
    )
    assert same == TOY
    assert dumps(same) == VALID
    assert fingerprint(same) == fingerprint(TOY)
    assert fingerprint(replace(TOY, note="")) != fingerprint(TOY)


def test_fingerprint_is_the_hash_of_the_compact_form() -> None:
    # printf '{"schema":"other/1","size":3}' | sha256sum
    assert fingerprint(Other(3)) == "5024c1b9e7f080ccdb161b9a5f6e8f7c7682898a2962562531e3ee3502266014"


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63) + 1, 2**63 - 1), st.text())
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_value(number: float, count: int, text: str) -> None:
    toy = Toy(text, (Group(1, number, shape=(count, -number)),), Switch(count), note=text, prices={text: number})
    try:
        written = dumps(toy)
    except InputError:
        assert text == "forbidden" or any("\ud800" <= char <= "\udfff" for char in text)
        return
    assert loads(written, "toy") == toy
    assert dumps(loads(written.encode(), "toy")) == written


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_not_written(number: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"toy: groups\[0\].peak_flops = -?(nan|inf): a finite number is expected"):
        write(replace(TOY, groups=(Group(1, number),)), tmp_path / "toy.json")
    assert list(tmp_path.iterdir()) == []


def test_stdin_and_stdout(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(VALID.encode())))
    assert read("-", "toy") == TOY
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[]")))
    with pytest.raises(InputError, match="stdin = \\[\\]: a toy file holds one JSON object"):
        read("-", "toy")
    write(TOY, "-")
    assert capfdbinary.readouterr().out == VALID.encode()


def test_write_replaces_whole_files_and_keeps_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "toy.json", tmp_path / "link.json"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write(TOY, link)
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == VALID
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.json", "toy.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "toy.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"toy.json: cannot be written: No space left on device"):
        write(TOY, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_devices_are_written_to_and_not_replaced() -> None:
    write(TOY, os.devnull)
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("name", ["", "nowhere/toy.json", "nul\0.json"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be written: "):
        write(TOY, f"{tmp_path}/{name}")


# --- versions -------------------------------------------------------------------------------------------------------


def test_an_older_version_is_upgraded() -> None:
    old = {"schema": "toy/1", "title": "t", "group": SMALL["groups"][0], "link": SMALL["link"]}
    assert loads(json.dumps(old), "toy") == loads(json.dumps(SMALL), "toy")


def test_a_broken_older_version_is_refused() -> None:
    assert refusal('{"schema": "toy/1"}') == "t.json: is not a valid toy/1 file (KeyError: 'title')"


def test_a_newer_version_is_refused() -> None:
    assert refusal_of(schema="toy/3") == (
        "t.json: schema = 'toy/3': written by a newer Meshwright; this one reads up to 'toy/2': update it"
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("other/1", "= 'other/1': this is an other file; a toy is expected (nearest: 'toy/2')"),
        ("toy", "= 'toy': a toy is expected (nearest: 'toy/2')"),
        ("toy/0", "= 'toy/0': a toy is expected (nearest: 'toy/2')"),
        (2, "= 2: a toy is expected (nearest: 'toy/2')"),
    ],
)
def test_a_wrong_schema_is_refused(schema: object, text: str) -> None:
    assert refusal_of(schema=schema) == f"t.json: schema {text}"


def test_a_missing_schema_is_refused() -> None:
    assert refusal('{"size": 3}', "other") == "t.json: schema: missing; an other file has 'other/1' here"
    assert refusal('{"Schema": "toy/2"}').endswith("missing; a toy file has 'toy/2' here (nearest: Schema)")


def test_every_older_version_needs_an_upgrade() -> None:
    with pytest.raises(AssertionError, match="one upgrade per older version"):
        Noun("toy", 3, Toy, upgrades={1: upgrade_1})


# --- fields ---------------------------------------------------------------------------------------------------------


def test_all_problems_at_once() -> None:
    groups = [
        {"count": "8", "peak_flops": True, "color": "gren"},
        {"cuont": 8, "peak_flops": 1},
        {"count": True, "peak_flops": 1, "shape": [1, 2, 3]},
        {"count": 8.0, "peak_flops": None, "shape": [1]},
        7,
    ]
    text = refusal_of(groups=groups, note=3, shared="true", prices=[], nested={"blue": [], "red": {}}, nmae="x")
    assert text.split("\n") == [
        "t.json: groups[0].count = '8': an integer is expected",
        "t.json: groups[0].peak_flops = True: a number is expected",
        "t.json: groups[0].color = 'gren': 'red' or 'green' is expected (nearest: 'green')",
        "t.json: groups[1].count: missing",
        "t.json: groups[1].cuont = 8: unknown key; known: count, peak_flops, color, shape (nearest: count)",
        "t.json: groups[2].count = True: an integer is expected",
        "t.json: groups[2].shape = [1, 2, 3]: a list of 2 is expected",
        "t.json: groups[3].count = 8.0: an integer is expected",
        "t.json: groups[3].peak_flops = None: a number is expected",
        "t.json: groups[3].shape[1]: missing",
        "t.json: groups[4] = 7: an object is expected",
        "t.json: note = 3: a string is expected",
        "t.json: shared = 'true': true or false is expected",
        "t.json: prices = []: an object is expected",
        "t.json: nested.blue = 'blue': 'red' or 'green' is expected",
        "t.json: nested.red = {}: a list is expected",
        "t.json: nmae = 'x': unknown key; known: name, groups, link, note, shared, degree, prices, nested"
        " (nearest: name)",
    ]


@pytest.mark.parametrize(
    ("link", "text"),
    [
        ({"size": "4", "kind": "ring"}, "link.size = '4': an integer is expected"),
        ({"ports": 4, "kind": "swich"}, "link.kind = 'swich': 'switch' or 'ring' is expected (nearest: 'switch')"),
        ({"size": 4, "kind": "switch"}, "link.ports: missing"),
        ({"prts": 4}, "link.ports: missing"),
        (4, "link = 4: an object is expected"),
    ],
)
def test_of_a_union_the_member_that_was_meant(link: object, text: str) -> None:
    assert f"t.json: {text}" in refusal_of(link=link)
    assert f"t.json: nested.red[0]{text.removeprefix('link')}" in refusal_of(nested={"red": [link]})


def test_of_a_union_of_scalars_all_members() -> None:
    assert refusal_of(degree=None) == "t.json: degree = None: an integer or a string is expected"


def test_the_rules_of_the_noun_are_checked() -> None:
    wrong = [{"count": 1, "peak_flops": 1}, {"count": 0, "peak_flops": 1}, {"count": -1, "peak_flops": 1}]
    assert refusal_of(groups=wrong).split("\n") == [
        "t.json: groups[1].count = 0: must be at least 1",
        "t.json: groups[2].count = -1: must be at least 1",
    ]
    assert refusal_of(name="forbidden").endswith(": this name is taken")


def test_an_endless_list_of_problems_is_cut() -> None:
    assert refusal_of(groups=[0] * 12345).split("\n")[99:] == [
        "t.json: groups[99] = 0: an object is expected",
        "t.json: and 12,245 more problems",
    ]


def test_keys_and_values_are_shown_short_and_harmless() -> None:
    text = refusal_of(**{"\x1b[31m\n": "x" * 999})
    assert text.startswith("t.json: ['\\x1b[31m\\n'] = 'xxx")
    assert len(text) < 250


def test_integers_fit_a_column() -> None:
    rule = "an integer of at most 2^63 - 1 in magnitude is expected"
    assert refusal_of(degree=2**63) == f"t.json: degree = 9223372036854775808: {rule}"
    assert loads(json.dumps({**SMALL, "prices": {"a": 10**20}}), "toy").prices == {"a": 1e20}


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "t.json: is empty; a toy file holds one JSON object"),
        (b" \n", "t.json: is empty; a toy file holds one JSON object"),
        (b"\x80\x04\x95", "t.json: is not UTF-8 text (byte 0); a toy file is a JSON text"),
        (VALID.encode("utf-16"), "t.json: is not UTF-8 text (byte 0); a toy file is a JSON text"),
        ("[1, 2]", "t.json = [1, 2]: a toy file holds one JSON object"),
        ("null", "t.json = None: a toy file holds one JSON object"),
        ("1e999", "t.json = 1e999: a finite number is expected"),
        ("1" * 5000, "t.json: no number may have more than 4300 digits"),
        ('{"a": 1,\n "b" 2}', "t.json: is not valid JSON at line 2, column 6: Expecting ':' delimiter"),
        ('{"a": NaN, "b": -Infinity}', "t.json = NaN: a finite number is expected"),
        ('{"a": {"b": 1, "b": 2}}', "t.json: the key 'b' stands twice in one object"),
        ("[" * 100_000, "t.json: is nested more than 100 levels deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "t.json: is nested more than 100 levels deep"),
        ("[" * 101 + "1" + "]" * 101, "t.json: is nested more than 100 levels deep"),
        ('{"name": "\\ud800"}', "t.json: name = '\\ud800': a lone surrogate is not a character"),
        ('{"name": "\ud800"}', "t.json: name = '\\ud800': a lone surrogate is not a character"),
    ],
)
def test_bad_content(content: str | bytes, text: str) -> None:
    assert refusal(content).startswith(text)


def test_a_cut_off_file_says_where() -> None:
    assert refusal('{"a": 1,\n "b": "x') == (
        "t.json: is not valid JSON at line 2, column 7: Unterminated string starting at; the file seems to be cut off"
    )
    assert refusal('{"a": [1').endswith("line 1, column 9: Expecting ',' delimiter; the file seems to be cut off")
    for length in range(1, len(VALID) - 2):
        assert "is not valid JSON at line" in refusal(VALID[:length])


def test_a_byte_order_mark_is_taken() -> None:
    assert loads(b"\xef\xbb\xbf" + VALID.encode(), "toy") == TOY


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    cases = {
        tmp_path / "confg.json": f"confg.json: there is no such file (nearest: {tmp_path}/config.json)",
        tmp_path / "nowhere" / "x.json": "x.json: there is no such file",
        tmp_path: "is a folder; a file is expected",
        tmp_path / "config.json" / "x": "cannot be read: Not a directory",
        Path("nul\0.json"): "cannot be read: embedded null byte",
    }
    for path, text in cases.items():
        with pytest.raises(InputError) as caught:
            read_json_object(path, "a Hugging Face config")
        assert str(caught.value).endswith(text)
    assert read_json_object(tmp_path / "config.json", "a Hugging Face config") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    path.write_text(VALID)
    path.chmod(0)
    with pytest.raises(InputError, match=r"toy.json: cannot be read: Permission denied"):
        read(path, "toy")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(InputError, match=r"huge.json: has 3.0 GiB; 64.0 MiB is the most that is read"):
        read(path, "toy")
    with pytest.raises(InputError, match=r"is longer than allowed; 64.0 MiB is the most that is read"):
        read("/dev/zero", "toy")


def test_an_unknown_noun() -> None:
    with pytest.raises(InputError, match=r"noun = tyo: known: toy, other .nearest: toy."):
        loads(VALID, "tyo")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["toy/2", "toy/1", "ring"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(list(SMALL)), inner),
    max_leaves=12,
)


def attempt(text: str | bytes) -> None:
    """Either an error of ours or a record that can be written."""
    try:
        record = loads(text, "toy")
    except InputError:
        return
    assert loads(dumps(record), "toy") == record


@given(st.binary() | st.text())
@settings(max_examples=300, deadline=None)
def test_any_bytes(content: bytes | str) -> None:
    attempt(content)


@given(st.dictionaries(st.sampled_from([*Toy.__dataclass_fields__, "schema", "title", "group"]), ANY_JSON), st.data())
@settings(max_examples=300, deadline=None)
def test_any_json(fields: dict[str, object], data: st.DataObject) -> None:
    version: dict[str, object] = data.draw(st.sampled_from([{"schema": "toy/1"}, {"schema": "toy/2"}, SMALL, {}]))
    attempt(json.dumps(version | fields))


@given(st.randoms(use_true_random=False), ANY_JSON)
@settings(max_examples=300, deadline=None)
def test_mutated_valid_files(rng: random.Random, value: object) -> None:
    node: Any = json.loads(VALID)
    mutant = node
    key: Any = "link"
    for _ in range(rng.randint(1, 4)):  # walk down and put any JSON in the place of what stands there
        if not isinstance(mutant.get(key) if isinstance(mutant, dict) else mutant[key], dict | list):
            break
        mutant = mutant[key]
        if not mutant:
            break
        key = rng.choice(sorted(mutant)) if isinstance(mutant, dict) else rng.randrange(len(mutant))
    if mutant:
        mutant[key] = value
    attempt(json.dumps(node))
    content = bytearray(VALID.encode())
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    attempt(bytes(content))


# --- the real nouns, schema and house ------------------------------------------------------------------------------


def test_presets_make_the_round_trip() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "NOUNS", REAL_NOUNS)
        for name in preset_names():
            cluster = preset_cluster(f"{name}x2")
            assert loads(dumps(cluster), "cluster") == cluster
        for noun in REAL_NOUNS:
            assert json_schema(noun)["additionalProperties"] is False


def test_json_schema() -> None:
    schema = json_schema("toy")
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["description"] == "A small noun that has one of everything."
    assert schema["properties"]["schema"] == {"const": "toy/2"}
    assert schema["required"] == ["schema", "name", "groups", "link"]
    assert schema["$defs"]["Group"]["properties"]["peak_flops"]["description"] == "FLOP/s of one device."
    assert "Toy" not in schema["$defs"]
    objects = [schema, *(part for part in schema["$defs"].values() if part["type"] == "object")]
    assert len(objects) == 4
    assert all(part["additionalProperties"] is False for part in objects)
    json.dumps(schema, allow_nan=False)


def test_pydantic_is_imported_when_used() -> None:
    code = "import sys, meshwright.io.native; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
