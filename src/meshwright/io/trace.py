"""Trace files: what ran when, for Perfetto (ui.perfetto.dev), Chrome (chrome://tracing) and comparisons.

Two formats, told apart by the file's suffix: `.pftrace` is Perfetto's own protobuf (TrackEvent packets), `.json` and
`.json.gz` are Chrome's trace events. Both count in whole nanoseconds, so a file holds `whole_nanoseconds(trace)`, and
`read_trace` gives exactly that back. Only traces written here are read: those of other tools use many times more of
either format (interned names, clocks, flows, asynchronous events) and are refused, not read by half.

References
    TrackEvent: https://perfetto.dev/docs/reference/synthetic-track-event
    Chrome: "Trace Event Format", Google, complete (X), counter (C) and metadata (M) events; `ts` and `dur` are in us.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.io.native import (
    MAX_PROBLEMS,
    nearest_file,
    parse_json_object,
    reason_of,
    refuse,
    shown,
    within,
    write_bytes,
)
from meshwright.results import Ran
from meshwright.schedule import compute_parts, parse_action
from meshwright.units import GiB, format_bytes

#: What a trace file's name may end in; the first is the one to take where nobody asks for another.
SUFFIXES = (".pftrace", ".json", ".json.gz")
MAX_TRACE_BYTES = GiB  # unpacked; protobuf itself takes twice that
MAX_S = 2**51 / 1e9  # 26 days: up to here float seconds and whole nanoseconds turn into one another exactly [derived]
MAX_INT = 2**63 - 1  # Perfetto's int64
PACKETS_PER_CHUNK = 100_000  # messages of Perfetto kept at once: they need some 20 times the space of their bytes

Arg = str | int | float | bool
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Something that ran from `start_s` to `end_s`; `args` are shown when one clicks on it."""

    name: str
    start_s: float
    end_s: float
    category: str = ""
    args: Mapping[str, Arg] = field(default_factory=dict)


@dataclass(frozen=True)
class Track:
    """One line of the picture: the spans follow one another or nest, in any order.

    `process` groups tracks (`rank 3`), `name` tells them apart in it (`compute`); "" is outside of every process.
    """

    name: str
    spans: Sequence[Span]
    process: str = ""


@dataclass(frozen=True)
class Counter:
    """A quantity over time: `points` are (time in s, value), each value lasting until the next point."""

    name: str
    process: str
    points: Sequence[tuple[float, float]]
    unit: str = "bytes"


@dataclass(frozen=True)
class Trace:
    """What a trace file holds. No two tracks, and no two counters, have both the same process and the same name.

    >>> forward = Span("0F0", 0.0, 0.002, "compute", {"rank": 0, "stage": 0, "microbatch": 0})
    >>> trace = Trace("one forward", [Track("compute", [forward], process="rank 0")])
    >>> folder = getfixture("tmp_path")  # any folder
    >>> write_trace(trace, folder / "step.json")
    >>> read_trace(folder / "step.json") == whole_nanoseconds(trace)
    True
    """

    name: str
    tracks: Sequence[Track]
    counters: Sequence[Counter] = ()


# --- what a file can hold ---------------------------------------------------------------------------------------------


def whole_nanoseconds(trace: Trace) -> Trace:
    """The trace as a file holds it: times rounded to the nanosecond, spans and points in order of time.

    A span stands after those it lies in; of spans with equal times the one given first is the outer one. Rounding keeps
    order, so no span comes to end before it starts or to leave the one around it. `trace_problems` must be empty.

    >>> spans = [Span("inner", 1e-9, 2e-9), Span("outer", 1.2e-9, 9e-9)]
    >>> [(span.name, span.start_s) for span in whole_nanoseconds(Trace("t", [Track("a", spans)])).tracks[0].spans]
    [('outer', 1e-09), ('inner', 1e-09)]
    """
    return Trace(trace.name, tuple(map(_rounded_track, trace.tracks)), tuple(map(_rounded_counter, trace.counters)))


def _rounded_track(track: Track) -> Track:
    spans = tuple(
        replace(span, start_s=start_ns / 1e9, end_s=end_ns / 1e9) for span, start_ns, end_ns in _in_order(track.spans)
    )
    return replace(track, spans=spans)


def _rounded_counter(counter: Counter) -> Counter:
    return replace(counter, points=tuple((ns / 1e9, value) for ns, value in _points_in_order(counter)))


def _ns(times_s: Iterable[float]) -> IntArray:
    return np.rint(np.fromiter(times_s, float) * 1e9).astype(np.int64)


def _in_order(spans: Sequence[Span]) -> list[tuple[Span, int, int]]:
    """Spans with start and end in ns, by start and, of those with the same start, the longest first."""
    start_ns, end_ns = _ns(span.start_s for span in spans), _ns(span.end_s for span in spans)
    order = np.lexsort((-end_ns, start_ns))  # stable
    sorted_spans = (spans[i] for i in order.tolist())
    return list(zip(sorted_spans, start_ns[order].tolist(), end_ns[order].tolist(), strict=True))


def _points_in_order(counter: Counter) -> list[tuple[int, float]]:
    times = _ns(time_s for time_s, _ in counter.points).tolist()
    values = [float(value) for _, value in counter.points]
    return sorted(zip(times, values, strict=True), key=lambda point: point[0])


def trace_problems(trace: Trace) -> list[Problem]:
    """All that keeps a trace out of a file; empty where nothing does. `where` is `track PROCESS/NAME, span NUMBER`.

    >>> for problem in trace_problems(Trace("t", [Track("compute", [Span("F", 0.0, 2.0), Span("B", 1.0, 3.0)])])):
    ...     print(problem)
    track compute, span 1 = B from 1.000000000 s to 3.000000000 s: starts inside F (span 0), which ends before it, at \
2.000000000 s; spans of one track nest or follow one another
    """
    found = [
        *_text_problems("trace", [trace.name]),
        *_twins("track", trace.tracks),
        *_twins("counter", trace.counters),
    ]
    for track in trace.tracks:
        found += islice(_track_problems(track), MAX_PROBLEMS + 1)
    for counter in trace.counters:
        found += islice(_counter_problems(counter), MAX_PROBLEMS + 1)
    return found


def _place(kind: str, holder: Track | Counter) -> str:
    return f"{kind} {holder.process}/{holder.name}" if holder.process else f"{kind} {holder.name}"


def _twins(kind: str, holders: Sequence[Track] | Sequence[Counter]) -> Iterator[Problem]:
    seen = set()
    for holder in holders:
        if (key := (holder.process, holder.name)) in seen:
            yield Problem(_place(kind, holder), "", f"stands twice; one {kind} of a process has this name")
        seen.add(key)


_TIME_RULE = f"must lie between 0 and {MAX_S:,.0f} s"


def _track_problems(track: Track) -> Iterator[Problem]:
    place = _place("track", track)
    yield from _text_problems(place, [track.name, track.process])
    start_s = np.fromiter((span.start_s for span in track.spans), float)
    end_s = np.fromiter((span.end_s for span in track.spans), float)
    outside = ~((start_s >= 0) & (end_s <= MAX_S))  # NaN is outside, too
    backward = end_s < start_s
    for i in np.flatnonzero(outside | backward).tolist():
        rule = "ends before it starts" if backward[i] else _TIME_RULE
        yield Problem(f"{place}, span {i}", _words(track.spans[i]), rule)
    if not (outside | backward).any():
        yield from _crossings(place, track.spans)
    for i, span in enumerate(track.spans):
        if span.args or not (span.name.isascii() and span.category.isascii()):
            yield from _text_problems(f"{place}, span {i}", [span.name, span.category])
            yield from _arg_problems(f"{place}, span {i}", span.args)


def _words(span: Span) -> str:
    return f"{span.name} from {span.start_s:.9f} s to {span.end_s:.9f} s"


def _crossings(place: str, spans: Sequence[Span]) -> Iterator[Problem]:
    """Spans that start inside another and end after it."""
    around: list[tuple[Span, int]] = []
    for span, start_ns, end_ns in _in_order(spans):
        while around and around[-1][1] <= start_ns:
            around.pop()
        if around and around[-1][1] < end_ns:
            other = around[-1][0]
            rule = f"starts inside {other.name} (span {_number(spans, other)}), which ends before it, at "
            rule += f"{other.end_s:.9f} s; spans of one track nest or follow one another"
            yield Problem(f"{place}, span {_number(spans, span)}", _words(span), rule)
        else:
            around.append((span, end_ns))


def _number(spans: Sequence[Span], wanted: Span) -> int:
    return next(i for i, span in enumerate(spans) if span is wanted)


def _arg_problems(place: str, args: Mapping[str, Arg]) -> Iterator[Problem]:
    yield from _text_problems(place, args)
    for key, value in args.items():
        if isinstance(value, str):
            yield from _text_problems(f"{place}: {key}", [value])
        elif not isinstance(value, int | float):
            yield Problem(f"{place}: {key}", shown(value), "a text, an integer, a number, true or false is expected")
        elif isinstance(value, int) and abs(value) > MAX_INT:
            yield Problem(f"{place}: {key}", shown(value), "an integer of at most 2^63 - 1 in magnitude is expected")
        elif not math.isfinite(value):
            yield Problem(f"{place}: {key}", shown(value), "a finite number is expected")


def _counter_problems(counter: Counter) -> Iterator[Problem]:
    place = _place("counter", counter)
    yield from _text_problems(place, [counter.name, counter.process, counter.unit])
    for i, (time_s, value) in enumerate(counter.points):
        if not 0 <= time_s <= MAX_S:
            yield Problem(f"{place}, point {i}", f"{time_s} s", _TIME_RULE)
        if not math.isfinite(value):
            yield Problem(f"{place}, point {i}", shown(value), "a finite number is expected")


def _text_problems(place: str, texts: Iterable[str]) -> Iterator[Problem]:
    for text in texts:
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError:
            yield Problem(place, shown(text), "a lone surrogate is not a character")


def measured_trace(name: str, timeline: Sequence[Sequence[Ran]]) -> Trace:
    """What the ranks of a recorded run did, a track each."""
    tracks = []
    for rank, row in enumerate(timeline):
        spans = []
        for ran in row:
            parts = compute_parts(parse_action(ran.action))
            args: dict[str, Arg] = {"rank": rank, "action": ran.action}
            if len(parts) == 1:
                args |= {"stage": parts[0].stage, "microbatch": parts[0].microbatch or 0}
            spans.append(Span(ran.action, ran.start_s, ran.end_s, "compute", args))
        tracks.append(Track("compute", tuple(spans), f"rank {rank}"))
    return Trace(name, tuple(tracks))


# --- writing ----------------------------------------------------------------------------------------------------------


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write `trace` to `path`, whole or not at all, in the format that the suffix asks for.

    Raises `InputError` for another suffix, a path that cannot be written, and whatever `trace_problems` finds.
    `.pftrace` needs the package `perfetto` (the extra `trace`). Equal traces give equal bytes.
    """
    refuse([*suffix_problems(path), *trace_problems(trace)], str(path))
    match _suffix(path):
        case ".pftrace":
            content = b"".join(_perfetto_chunks(trace))
        case ".json":
            content = b"".join(_chrome_chunks(trace))
        case _:
            content = gzip.compress(b"".join(_chrome_chunks(trace)), compresslevel=6, mtime=0)
    write_bytes(content, path)


def _suffix(path: str | Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if Path(path).name.endswith(suffix)), None)


def suffix_problems(path: str | Path) -> list[Problem]:
    """What is wrong with the name of a trace file, to be asked before the work that ends in it."""
    if _suffix(path):
        return []
    given = Path(path).suffix
    suffix = nearest_name(given, SUFFIXES) or SUFFIXES[0]
    nearest = f"{str(path).removesuffix(given)}{suffix}"
    return [Problem(str(path), "", f"a trace file ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}", nearest)]


@dataclass(frozen=True)
class _Ids:
    """Numbers for names. Thread numbers lie above process numbers: the thread with its process's number is special to
    viewers. Process 0 is the one without a name."""

    process: Mapping[str, int]
    first_track: int
    first_counter: int


def _ids(trace: Trace) -> _Ids:
    holders: list[Track | Counter] = [*trace.tracks, *trace.counters]
    names = dict.fromkeys(holder.process for holder in holders if holder.process)
    first_track = len(names) + 1
    processes = {"": 0, **{name: number for number, name in enumerate(names, 1)}}
    return _Ids(processes, first_track, first_track + len(trace.tracks))


# --- Perfetto ---------------------------------------------------------------------------------------------------------

_SEQUENCE = 1  # one writer, thus one sequence: packets with equal times stay in the order of the file


def _perfetto_chunks(trace: Trace) -> Iterator[bytes]:
    """The packets; chunks put one behind the other are one message, since `packet` is a repeated field."""
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    ids = _ids(trace)
    builder = TraceProtoBuilder()
    _describe(builder, trace, ids)
    yield builder.serialize()
    for uuid, track in enumerate(trace.tracks, ids.first_track):
        edges = _edges(track.spans)
        while some := list(islice(edges, PACKETS_PER_CHUNK)):
            builder = TraceProtoBuilder()
            _add_edges(builder, uuid, some)
            yield builder.serialize()
    for uuid, counter in enumerate(trace.counters, ids.first_counter):
        builder = TraceProtoBuilder()
        _add_points(builder, uuid, _points_in_order(counter))
        yield builder.serialize()
    # The session's name comes last: a file without it was cut off, even if between two packets.
    builder = TraceProtoBuilder()
    builder.add_packet().trace_config.unique_session_name = trace.name
    yield builder.serialize()


def _describe(builder: Any, trace: Trace, ids: _Ids) -> None:
    for process, pid in ids.process.items():
        if process:
            entry = _descriptor(builder, pid).process
            entry.pid, entry.process_name, entry.legacy_sort_index = pid, process, pid
    for uuid, track in enumerate(trace.tracks, ids.first_track):
        descriptor = _descriptor(builder, uuid)
        if track.process:
            entry = descriptor.thread
            entry.pid, entry.tid = ids.process[track.process], uuid
            entry.thread_name, entry.legacy_sort_index = track.name, uuid
        else:
            descriptor.name = track.name
    for uuid, counter in enumerate(trace.counters, ids.first_counter):
        descriptor = _descriptor(builder, uuid)
        descriptor.name = counter.name
        if counter.process:
            descriptor.parent_uuid = ids.process[counter.process]
        if counter.unit == "bytes":
            descriptor.counter.unit = descriptor.counter.UNIT_SIZE_BYTES
        else:
            descriptor.counter.unit_name = counter.unit


def _descriptor(builder: Any, uuid: int) -> Any:
    packet = builder.add_packet()
    packet.trusted_packet_sequence_id = _SEQUENCE
    packet.track_descriptor.uuid = uuid
    return packet.track_descriptor


def _edges(spans: Sequence[Span]) -> Iterator[tuple[int, Span | None]]:
    """When spans begin (with the span) and end (with None), in an order in which every end closes the last begun.

    >>> spans = [Span("child", 0.0, 1e-9), Span("parent", 0.0, 3e-9), Span("next", 3e-9, 4e-9)]
    >>> [(time_ns, span and span.name) for time_ns, span in _edges(spans)]
    [(0, 'parent'), (0, 'child'), (1, None), (3, None), (3, 'next'), (4, None)]
    """
    open_until: list[int] = []
    for span, start_ns, end_ns in _in_order(spans):
        while open_until and open_until[-1] <= start_ns:
            yield open_until.pop(), None
        yield start_ns, span
        open_until.append(end_ns)
    while open_until:
        yield open_until.pop(), None


def _add_edges(builder: Any, uuid: int, edges: Iterable[tuple[int, Span | None]]) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent

    begin, end = TrackEvent.TYPE_SLICE_BEGIN, TrackEvent.TYPE_SLICE_END
    for time_ns, span in edges:
        packet = builder.add_packet()
        packet.timestamp = time_ns
        packet.trusted_packet_sequence_id = _SEQUENCE
        event = packet.track_event
        event.track_uuid = uuid
        if span is None:
            event.type = end
            continue
        event.type = begin
        event.name = span.name
        if span.category:
            event.categories.append(span.category)
        for key, value in span.args.items():
            _annotate(event.debug_annotations.add(), key, value)


def _annotate(annotation: Any, key: str, value: Arg) -> None:
    annotation.name = key
    if isinstance(value, bool):  # first: a bool is an int as well
        annotation.bool_value = value
    elif isinstance(value, int):
        annotation.int_value = value
    elif isinstance(value, float):
        annotation.double_value = value
    else:
        annotation.string_value = value


def _add_points(builder: Any, uuid: int, points: Iterable[tuple[int, float]]) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent

    for time_ns, value in points:
        packet = builder.add_packet()
        packet.timestamp = time_ns
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.track_event.type = TrackEvent.TYPE_COUNTER
        packet.track_event.track_uuid = uuid
        packet.track_event.double_counter_value = value


def _from_perfetto(content: bytes, where: str) -> Trace:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace as Message

    message = Message()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise _not_a_trace(where, "is not a Perfetto trace, or was cut off") from error
    if not message.packet or not message.packet[-1].HasField("trace_config"):
        raise _not_a_trace(where, "does not end as Meshwright ends a trace: it was cut off, or another tool wrote it")
    try:
        return _trace_of_packets(message.packet)
    except (TypeError, ValueError) as error:
        raise _not_a_trace(where, f"is not a trace that Meshwright wrote ({error})") from error


def _trace_of_packets(packets: Sequence[Any]) -> Trace:
    found = {p.track_descriptor.uuid: p.track_descriptor for p in packets if p.HasField("track_descriptor")}
    processes = {pid: _text(one.process.process_name) for pid, one in found.items() if one.HasField("process")}
    spans, points = _events_by_track(islice(packets, len(packets) - 1), found)
    tracks = [
        Track(_text(one.thread.thread_name or one.name), tuple(spans[uuid]), processes.get(one.thread.pid, ""))
        for uuid, one in found.items()
        if not one.HasField("process") and not one.HasField("counter")
    ]
    counters = [
        Counter(_text(one.name), processes.get(one.parent_uuid, ""), tuple(points[uuid]), _unit(one.counter))
        for uuid, one in found.items()
        if one.HasField("counter")
    ]
    return Trace(_text(packets[-1].trace_config.unique_session_name), tuple(tracks), tuple(counters))


def _unit(counter: Any) -> str:
    return "bytes" if counter.unit == counter.UNIT_SIZE_BYTES else _text(counter.unit_name)


def _events_by_track(
    packets: Iterable[Any], descriptors: Mapping[int, Any]
) -> tuple[dict[int, list[Span]], dict[int, list[tuple[float, float]]]]:
    """The spans and the points of each track, by its uuid, in the order in which they begin."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent

    spans: dict[int, list[Span]] = {uuid: [] for uuid in descriptors}
    points: dict[int, list[tuple[float, float]]] = {uuid: [] for uuid in descriptors}
    begun: dict[int, list[int]] = {uuid: [] for uuid in descriptors}  # positions in `spans` that wait for their end
    for packet in packets:
        if packet.HasField("track_descriptor"):
            continue
        event, time_s = packet.track_event, packet.timestamp / 1e9
        if not packet.HasField("track_event") or event.track_uuid not in descriptors:
            raise ValueError(f"packet of kind {packet.WhichOneof('data')} on no known track")
        uuid = event.track_uuid
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            begun[uuid].append(len(spans[uuid]))
            category = "".join(map(_text, event.categories))
            spans[uuid].append(Span(_text(event.name), time_s, math.nan, category, _args(event)))
        elif event.type == TrackEvent.TYPE_SLICE_END and begun[uuid]:
            position = begun[uuid].pop()
            spans[uuid][position] = replace(spans[uuid][position], end_s=time_s)
        elif event.type == TrackEvent.TYPE_COUNTER:
            points[uuid].append((time_s, event.double_counter_value))
        else:
            raise ValueError(f"event of type {event.type} at {time_s} s, where none of that type can be")
    if any(begun.values()):
        raise ValueError("spans without an end")
    return spans, points


def _args(event: Any) -> dict[str, Arg]:
    found = {}
    for annotation in event.debug_annotations:
        kind = annotation.WhichOneof("value")
        if kind not in ("bool_value", "int_value", "double_value", "string_value"):
            raise ValueError(f"annotation {annotation.name!r} of kind {kind}")
        value = getattr(annotation, kind)
        found[_text(annotation.name)] = _text(value) if kind == "string_value" else value
    return found


# --- Chrome -----------------------------------------------------------------------------------------------------------

Event = dict[str, Any]


def _chrome_chunks(trace: Trace) -> Iterator[bytes]:
    """The JSON text; `otherData.name` is the trace's, and the metadata `counter` is ours: viewers skip it."""
    ids = _ids(trace)
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    head = encode({"displayTimeUnit": "ns", "otherData": {"name": trace.name}})
    yield f'{head[:-1]},"traceEvents":['.encode()
    separator = ""
    events = _chrome_events(trace, ids)
    while some := list(islice(events, PACKETS_PER_CHUNK)):
        yield f"{separator}{encode(some)[1:-1]}".encode()
        separator = ","
    yield b"]}\n"


def _chrome_events(trace: Trace, ids: _Ids) -> Iterator[Event]:
    for process, pid in ids.process.items():
        if process:
            yield _metadata("process_name", pid, {"name": process})
            yield _metadata("process_sort_index", pid, {"sort_index": pid})
    for tid, track in enumerate(trace.tracks, ids.first_track):
        pid = ids.process[track.process]
        yield {**_metadata("thread_name", pid, {"name": track.name}), "tid": tid}
        yield {**_metadata("thread_sort_index", pid, {"sort_index": tid}), "tid": tid}
    for counter in trace.counters:
        yield _metadata("counter", ids.process[counter.process], {"name": counter.name, "unit": counter.unit})
    for tid, track in enumerate(trace.tracks, ids.first_track):
        yield from _span_events(track, ids.process[track.process], tid)
    for counter in trace.counters:
        pid, series = ids.process[counter.process], counter.unit or "value"
        for ns, value in _points_in_order(counter):
            yield {"ph": "C", "name": counter.name, "pid": pid, "ts": ns / 1e3, "args": {series: value}}


def _metadata(name: str, pid: int, args: Mapping[str, str | int]) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "args": args}


def _span_events(track: Track, pid: int, tid: int) -> Iterator[Event]:
    for span, start_ns, end_ns in _in_order(track.spans):
        event: Event = {"ph": "X", "name": span.name, "pid": pid, "tid": tid}
        event |= {"ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}
        if span.category:
            event["cat"] = span.category
        if span.args:
            event["args"] = dict(span.args)
        yield event


def _from_chrome(content: bytes, where: str) -> Trace:
    data = parse_json_object(content, "a trace file", where)
    try:
        return _trace_of_events(data["otherData"]["name"], data["traceEvents"])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:  # the content is unchecked
        reason = f"{type(error).__name__}: {error}"
        raise _not_a_trace(where, f"is not a trace that Meshwright wrote ({reason})") from error


def _trace_of_events(name: str, events: Sequence[Event]) -> Trace:
    processes: dict[int, str] = {0: ""}
    tracks: dict[int, tuple[str, int, list[Span]]] = {}  # by thread: name, process, spans
    counters: dict[tuple[int, str], tuple[str, list[tuple[float, float]]]] = {}  # by process and name: unit, points
    for event in events:
        match event["ph"], event["name"]:
            case "M", "process_name":
                processes[event["pid"]] = _text(event["args"]["name"])
            case "M", "thread_name":
                tracks[event["tid"]] = (_text(event["args"]["name"]), event["pid"], [])
            case "M", "counter":
                key = event["pid"], _text(event["args"]["name"])
                counters[key] = (_text(event["args"]["unit"]), [])
            case "M", "process_sort_index" | "thread_sort_index":
                pass
            case "X", text:
                start_ns = _whole_ns(event["ts"])
                end_ns = start_ns + _whole_ns(event["dur"])
                args = dict(event.get("args", {}))
                span = Span(_text(text), start_ns / 1e9, end_ns / 1e9, _text(event.get("cat", "")), args)
                tracks[event["tid"]][2].append(span)
            case "C", text:
                (value,) = event["args"].values()
                counters[event["pid"], text][1].append((_whole_ns(event["ts"]) / 1e9, float(value)))
            case phase, text:
                raise ValueError(f"event {text!r} of phase {phase!r}")
    return Trace(
        _text(name),
        tuple(Track(track, tuple(spans), processes[pid]) for track, pid, spans in tracks.values()),
        tuple(
            Counter(counter, processes[pid], tuple(points), unit) for (pid, counter), (unit, points) in counters.items()
        ),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _whole_ns(microseconds: float) -> int:
    return round(microseconds * 1e3)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> Trace:
    """The trace in a file that `write_trace` wrote: equal to `whole_nanoseconds` of what it was given.

    Raises one clear `InputError` where the file is missing, too long, broken, cut off or of another tool.
    """
    refuse(suffix_problems(path), str(path))
    where, content = str(path), _content(path)
    trace = _from_perfetto(content, where) if _suffix(path) == ".pftrace" else _from_chrome(content, where)
    refuse([within(problem, where) for problem in trace_problems(trace)], where)
    return trace


def _content(path: str | Path) -> bytes:
    """The file, unpacked; not more of it than `MAX_TRACE_BYTES`, since a small file can unpack to any size."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            packed = _suffix(path) == ".json.gz"
            content = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_TRACE_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError([Problem(where, "", "there is no such file", nearest_file(Path(path)))]) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _not_a_trace(where, f"cannot be unpacked: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError([Problem(where, "", f"cannot be read: {reason_of(error)}")]) from error
    if len(content) > MAX_TRACE_BYTES:
        raise InputError([Problem(where, "", f"is longer than {format_bytes(MAX_TRACE_BYTES)}, the most that is read")])
    return content


def _not_a_trace(where: str, rule: str) -> InputError:
    return InputError([Problem(where, "", rule)])
