"""Instances of the ASPLOS/EuroSys 2025 contest on intra-operator parallelism, as the choice problem that they are.

The format is one JSON object, plain or gzipped: `problem.nodes.{costs, usages, intervals}` hold a list for each node,
`problem.edges.{nodes, costs}` one for each edge (the matrix row-major over the strategies of its nodes), and
`problem.usage_limit` the memory. 10^18 as a cost means infinity. Usages, intervals, edges and the limit may be absent.

Files hold 10^7 numbers: the lists turn into arrays in one go, and only where that fails `io.contest_faults` looks at
each number to say what is wrong.
"""

from __future__ import annotations

import gc
import gzip
import math
import sys
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.errors import InputError, Problem
from meshwright.io.contest_faults import faults
from meshwright.io.native import nearest_file, reason_of
from meshwright.units import GiB, format_bytes

#: A cost from which on it forbids the strategy, or the pair of strategies [spec: the contest's format].
INFINITE_COST = 10**18

#: From this limit on the tolerance of `choice.is_legal`, 1e-12 of it, might let whole usages exceed it by one.
LARGE_LIMIT = 5e11

MAX_CONTENT_BYTES = 2 * GiB  # of JSON, unpacked: ten times the largest instance of the contest

Lists = dict[str, Any]  # the file's `problem`


@dataclass(frozen=True, eq=False)
class Contest:
    """An instance, and the lists of the file that it was read from, for whoever checks a solution."""

    instance: Instance
    problem: Lists


def read_contest(path: str | Path, content: bytes | None = None) -> Contest:
    """The instance in a `.json` or `.json.gz` file (`-` is stdin), whose content may have been read before. Raises
    `InputError` with all that is wrong."""
    where = "stdin" if str(path) == "-" else str(path)
    return contest_of(_unpacked(content_of(path) if content is None else content, where), where)


def contest_of(content: bytes, where: str = "input") -> Contest:
    """The instance in a file's content.

    >>> found = contest_of(b'{"problem": {"nodes": {"costs": [[1, 2]]}}}')
    >>> found.instance.num_nodes, found.instance.limit
    (1, inf)
    """
    import orjson  # here: only instances need it

    with _no_garbage_collection():
        try:
            data = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise InputError([Problem(where, "", f"is not valid JSON: {error}")]) from None
        suspicious = b"true" in content or b"false" in content  # Python takes them for 1 and 0
        instance = None if suspicious else _instance(data)
        if instance is None:
            if found := faults(data, where):
                raise InputError(found)
            instance = _instance(data)
            assert instance is not None, "an instance without a fault turns into arrays"
    return Contest(instance, data["problem"])


def _instance(data: Any) -> Instance | None:
    """The arrays of the file's lists, or None where something in them is not as it should be."""
    try:
        problem = data["problem"]
        nodes, edges = problem["nodes"], problem.get("edges") or {"nodes": [], "costs": []}
        costs, limit = nodes["costs"], problem.get("usage_limit")
        first_N, cost_C = _flat(costs)
        num_nodes = len(costs)
        usages = nodes.get("usages")
        given = nodes.get("intervals") if usages else None
        intervals = _whole(given, 2) if given else np.zeros((num_nodes, 2), int)
        usage_first, usage = _flat(usages) if usages else (np.zeros(num_nodes + 1, dtype=np.int64), np.zeros(0))
        arity = np.fromiter(map(len, edges["nodes"]), np.int64, len(edges["nodes"]))
        if (arity < 2).any():  # a cost of one node
            return _instance(_without_unary(data)) if (arity > 0).all() else None
        ends = _whole(edges["nodes"], 2)
        matrix_first, matrix = _flat(edges["costs"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    sizes = np.diff(first_N)
    if not (
        len(intervals) == num_nodes == len(usage_first) - 1
        and len(ends) == len(matrix_first) - 1
        and (not usages or np.array_equal(np.diff(usage_first), sizes))
        and (sizes > 0).all()
        and (intervals[:, 0] <= intervals[:, 1]).all()
        and ((ends >= 0) & (ends < num_nodes)).all()
        and np.array_equal(np.diff(matrix_first), sizes[ends].prod(axis=1))
        and all((values >= 0).all() for values in (cost_C, usage, matrix))
        and (limit is None or (type(limit) in (int, float) and limit >= 0))
    ):
        return None
    for values in (cost_C, matrix):
        values[values >= INFINITE_COST] = math.inf
    if (ends[:, 0] == ends[:, 1]).any():
        ends, matrix_first, matrix = _without_loops(first_N, cost_C, ends, matrix_first, matrix)
    lasting = intervals[:, 0] < intervals[:, 1]
    kept_V = np.repeat(lasting, np.diff(usage_first))
    name = data["problem"].get("name", "")
    return Instance(
        name=name if isinstance(name, str) else "",
        first_N=first_N,
        cost_C=cost_C,
        edges_E=ends,
        matrix_first_E=matrix_first,
        matrix_M=matrix,
        usage_node_U=np.flatnonzero(lasting),
        intervals_U=intervals[lasting],
        usage_first_U=np.concatenate([[0], np.cumsum(np.diff(usage_first)[lasting])]),
        usage_V=usage[kept_V],
        limit=math.inf if limit is None else _limit(limit, usage),
    )


def _limit(limit: float, usage: Array) -> float:
    """The limit. A large one is lowered such that with its tolerance it ends half way to the next whole usage."""
    if limit < LARGE_LIMIT or not np.array_equal(usage, np.floor(usage)):
        return float(limit)
    return (math.floor(limit) + 0.5) * (1 - 1e-12)


def _flat(rows: list[list[Any]]) -> tuple[Array, Array]:
    """Where each row starts (and the last ends), and all rows in one array. Raises where an entry is no number."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    first = np.concatenate([[0], np.cumsum(lengths)])
    values = np.array(array("d", chain.from_iterable(rows)))  # NumPy itself would take "5" for 5
    if len(rows) and not all(type(row) is list for row in rows):
        raise TypeError("rows are lists")
    return first, values


def _whole(rows: list[list[int]], width: int) -> Array:
    """Rows of `width` whole numbers. Raises where there is anything else."""
    values = list(chain.from_iterable(rows))
    if any(len(row) != width for row in rows) or any(type(value) is not int for value in values):
        raise TypeError("rows of whole numbers")
    return np.array(values, dtype=np.int64).reshape(-1, width)


def _without_unary(data: Lists) -> Lists:
    """The same problem with the costs of edges of one node added to the node's."""
    problem = data["problem"]
    nodes, edges = problem["nodes"], problem["edges"]
    costs = list(nodes["costs"])
    kept = []
    for ends, values in zip(edges["nodes"], edges["costs"], strict=True):
        if len(ends) != 1:
            kept.append((ends, values))
            continue
        if ends[0] < 0:
            raise ValueError("nodes are numbered from 0")
        costs[ends[0]] = [one + other for one, other in zip(costs[ends[0]], values, strict=True)]
    joined = {"nodes": [ends for ends, _ in kept], "costs": [values for _, values in kept]}
    return {"problem": {**problem, "nodes": {**nodes, "costs": costs}, "edges": joined}}


def _without_loops(
    first_N: Array, cost_C: Array, ends: Array, first: Array, matrix: Array
) -> tuple[Array, Array, Array]:
    """The edges but those from a node to itself, whose diagonals are added to the node's costs (in place)."""
    loops = ends[:, 0] == ends[:, 1]
    for edge in np.flatnonzero(loops):
        start, stop = first_N[ends[edge, 0]], first_N[ends[edge, 0] + 1]
        cost_C[start:stop] += matrix[first[edge] : first[edge + 1] : stop - start + 1]
    lengths = np.diff(first)
    kept = np.concatenate([[0], np.cumsum(lengths[~loops])])
    return ends[~loops], kept, matrix[np.repeat(~loops, lengths)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of lists are made and none is garbage: looking for it takes as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()  # nor look at them later
            gc.enable()


def content_of(path: str | Path) -> bytes:
    """The bytes of a file, or of stdin, as they are."""
    where = "stdin" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read(MAX_CONTENT_BYTES + 1)
        with open(path, "rb") as file:
            return file.read(MAX_CONTENT_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError([Problem(where, "", "there is no such file", nearest_file(Path(path)))]) from error
    except IsADirectoryError as error:
        raise InputError([Problem(where, "", "is a folder; a file is expected")]) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError([Problem(where, "", f"cannot be read: {reason_of(error)}")]) from error


def _unpacked(content: bytes, where: str) -> bytes:
    """The content, unpacked where it is gzipped (by its first bytes, whatever the file is called)."""
    if content[:2] == b"\x1f\x8b":
        content = _gunzipped(content, where)
    if len(content) > MAX_CONTENT_BYTES:
        raise InputError([Problem(where, "", f"holds more than the {format_bytes(MAX_CONTENT_BYTES)} that are read")])
    return content


def _gunzipped(content: bytes, where: str) -> bytes:
    """At most a byte more than is allowed: a small file can unpack to any size."""
    import io

    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            return packed.read(MAX_CONTENT_BYTES + 1)
    except EOFError:
        raise InputError([Problem(where, "", "is a gzip file that breaks off before its end")]) from None
    except (OSError, zlib.error) as error:
        raise InputError([Problem(where, "", f"is a broken gzip file: {error}")]) from None
