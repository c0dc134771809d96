"""Trace files: what goes in comes out, to the nanosecond; what other tools will see; what is refused."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace as Message
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent

from meshwright.errors import InputError
from meshwright.io import trace as door
from meshwright.io.trace import (
    SUFFIXES,
    Counter,
    Span,
    Trace,
    Track,
    read_trace,
    trace_problems,
    whole_nanoseconds,
    write_trace,
)

ARGS = {"rank": 3, "action": "1F0", "share": 0.25, "recomputed": True, "last": False, "least": -(2**63) + 1}

#: Two ranks; a step with a forward and two layers in it, a span of no length, spans that touch, and memory.
TRACE = Trace(
    "llama à la 日本 🦙",
    (
        Track(
            "compute",
            (
                Span("step", 0.0, 10e-6, "step"),
                Span("1F0", 0.0, 4e-6, "forward", ARGS),
                Span("layer 0 – norm", 0.0, 1e-6),
                Span("layer 1", 1e-6, 4e-6),
                Span("mark", 4e-6, 4e-6),
                Span("1B0", 4e-6, 10e-6, "backward"),
            ),
            "rank 1",
        ),
        Track("communication", (Span("all-reduce", 1.5e-6, 9.25e-6, args={"bytes": 2**40}),), "rank 1"),
        Track("compute", (), "rank 0"),
        Track("optimizer", (Span("Adam", 10e-6, 11.001e-6),)),
    ),
    (
        Counter("memory", "rank 1", ((0.0, 0.0), (1e-6, 2.0**41), (9e-6, 0.5))),
        Counter("power", "", ((2e-6, 699.5),), unit="W"),
        Counter("temperature", "rank 7", (), unit=""),
    ),
)

# --- any trace that can be written ------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = TEXTS | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
TIMES = st.floats(0, door.MAX_S) | st.floats(0, 1e-7) | st.integers(0, 10**7).map(lambda ns: ns / 1e9)


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    """Spans that nest: begins and ends in the order of a well-formed bracket word, at times that never go back."""
    half = draw(st.integers(0, 6))
    times = sorted(draw(st.lists(TIMES, min_size=2 * half, max_size=2 * half)))
    spans: list[Span] = []
    begun: list[tuple[int, float]] = []
    for time_s in times:
        left = half - len(spans)
        if begun and (left == 0 or draw(st.booleans())):
            position, start_s = begun.pop()
            spans[position] = dataclasses.replace(spans[position], start_s=start_s, end_s=time_s)
        else:
            begun.append((len(spans), time_s))
            spans.append(Span(draw(TEXTS), 0, 0, draw(TEXTS), draw(st.dictionaries(TEXTS, VALUES, max_size=3))))
    return draw(st.permutations(spans))


PROCESSES = st.sampled_from(["", "rank 0", "rank 1", "ランク"])
POINTS = st.lists(st.tuples(TIMES, st.floats(allow_nan=False, allow_infinity=False)), max_size=4)
TRACKS = st.lists(st.builds(Track, TEXTS, span_lists(), PROCESSES), max_size=4, unique_by=lambda t: (t.process, t.name))
COUNTERS = st.lists(
    st.builds(Counter, TEXTS, PROCESSES, POINTS, st.sampled_from(["bytes", "", "W"]) | TEXTS),
    max_size=3,
    unique_by=lambda counter: (counter.process, counter.name),
)
TRACES = st.builds(Trace, TEXTS, TRACKS, COUNTERS)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=100)
@given(trace=TRACES)
def test_what_was_written_is_read_to_the_nanosecond(
    trace: Trace, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("traces") / f"t{suffix}"
    write_trace(trace, path)
    assert read_trace(path) == whole_nanoseconds(trace)


@given(trace=TRACES)
def test_rounding_moves_no_time_by_more_than_half_a_nanosecond(trace: Trace) -> None:
    rounded = whole_nanoseconds(trace)
    assert whole_nanoseconds(rounded) == rounded
    for before, after in zip(trace.tracks, rounded.tracks, strict=True):
        assert sorted(span.name for span in before.spans) == sorted(span.name for span in after.spans)
        for end in ("start_s", "end_s"):
            times_s = [sorted(getattr(span, end) for span in track.spans) for track in (before, after)]
            # Near 26 days a float itself is only good to 0.23 ns, and there are two roundings.
            assert all(abs(old - new) <= 0.5e-9 + 2e-16 * new for old, new in zip(*times_s, strict=True))
        assert all(span.start_s <= span.end_s for span in after.spans)


# --- what other tools will see ----------------------------------------------------------------------------------------


def test_perfetto_sees_every_span_nested_as_it_ran(tmp_path: Path) -> None:
    write_trace(TRACE, path := tmp_path / "t.pftrace")
    message = Message.FromString(path.read_bytes())
    names = {}
    spans, open_spans = [], {}
    for packet in message.packet:
        if packet.HasField("track_descriptor"):
            found = packet.track_descriptor
            names[found.uuid] = found.thread.thread_name or found.process.process_name or found.name
            continue
        if packet.HasField("trace_config") or packet.track_event.type == TrackEvent.TYPE_COUNTER:
            continue
        event = packet.track_event
        stack = open_spans.setdefault(event.track_uuid, [])
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            assert not stack or packet.timestamp >= stack[-1][1]
            stack.append((event, packet.timestamp))
        else:
            assert event.type == TrackEvent.TYPE_SLICE_END
            begin, start_ns = stack.pop()
            args = {one.name: getattr(one, one.WhichOneof("value")) for one in begin.debug_annotations}
            where = names[event.track_uuid]
            spans.append((where, len(stack), begin.name, start_ns, packet.timestamp, list(begin.categories), args))
    assert not any(open_spans.values())
    assert spans == [  # in the order of their ends
        ("compute", 2, "layer 0 – norm", 0, 1000, [], {}),
        ("compute", 2, "layer 1", 1000, 4000, [], {}),
        ("compute", 1, "1F0", 0, 4000, ["forward"], ARGS),
        ("compute", 2, "mark", 4000, 4000, [], {}),
        ("compute", 1, "1B0", 4000, 10000, ["backward"], {}),
        ("compute", 0, "step", 0, 10000, ["step"], {}),
        ("communication", 0, "all-reduce", 1500, 9250, [], {"bytes": 2**40}),
        ("optimizer", 0, "Adam", 10000, 11001, [], {}),
    ]
    # True == 1 in Python, so the kinds once more.
    (forward,) = [p.track_event for p in message.packet if p.track_event.name == "1F0"]
    kinds = {one.name: one.WhichOneof("value") for one in forward.debug_annotations}
    assert kinds["rank"] == kinds["least"] == "int_value"
    assert kinds["recomputed"] == kinds["last"] == "bool_value"
    assert (kinds["share"], kinds["action"]) == ("double_value", "string_value")


def test_perfetto_sees_processes_threads_and_counters_with_units(tmp_path: Path) -> None:
    write_trace(TRACE, path := tmp_path / "t.pftrace")
    packets = Message.FromString(path.read_bytes()).packet
    found = {p.track_descriptor.uuid: p.track_descriptor for p in packets if p.HasField("track_descriptor")}
    assert 0 not in found  # Perfetto's default track
    processes = {one.process.pid: one.process.process_name for one in found.values() if one.HasField("process")}
    assert sorted(processes.values()) == ["rank 0", "rank 1", "rank 7"]
    threads = [one.thread for one in found.values() if one.HasField("thread")]
    assert [(processes[one.pid], one.thread_name) for one in threads] == [
        ("rank 1", "compute"), ("rank 1", "communication"), ("rank 0", "compute"),
    ]  # fmt: skip
    assert len({one.tid for one in threads} | set(processes)) == len(threads) + len(processes)  # no "main thread"
    counters = [one for one in found.values() if one.HasField("counter")]
    unit = counters[0].counter
    assert [(one.name, one.counter.unit, one.counter.unit_name) for one in counters] == [
        ("memory", unit.UNIT_SIZE_BYTES, ""), ("power", unit.UNIT_UNSPECIFIED, "W"), ("temperature", 0, ""),
    ]  # fmt: skip
    assert found[counters[0].parent_uuid].process.process_name == "rank 1"
    values = [
        (found[p.track_event.track_uuid].name, p.timestamp, p.track_event.double_counter_value)
        for p in packets
        if p.track_event.type == TrackEvent.TYPE_COUNTER
    ]
    assert values == [("memory", 0, 0.0), ("memory", 1000, 2.0**41), ("memory", 9000, 0.5), ("power", 2000, 699.5)]
    assert {p.trusted_packet_sequence_id for p in packets if p.HasField("track_event")} == {1}


def test_chrome_sees_complete_events_in_microseconds(tmp_path: Path) -> None:
    trace = Trace(
        "one step",
        [Track("compute", [Span("0F0", 1e-9, 2.5e-6, "forward", {"rank": 0, "exact": True})], "rank 0")],
        [Counter("memory", "rank 0", [(1e-6, 3)])],
    )
    write_trace(trace, path := tmp_path / "t.json")
    # Process 1; thread 2, since threads are numbered behind the processes. 1 ns is 0.001 us.
    assert json.loads(path.read_text("utf-8")) == {
        "displayTimeUnit": "ns",
        "otherData": {"name": "one step"},
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "rank 0"}},
            {"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"sort_index": 1}},
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "compute"}},
            {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": 2, "args": {"sort_index": 2}},
            {"ph": "M", "name": "counter", "pid": 1, "args": {"name": "memory", "unit": "bytes"}},
            {
                "ph": "X", "name": "0F0", "cat": "forward", "pid": 1, "tid": 2, "ts": 0.001, "dur": 2.499,
                "args": {"rank": 0, "exact": True},
            },
            {"ph": "C", "name": "memory", "pid": 1, "ts": 1.0, "args": {"bytes": 3.0}},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kinds_of_args_survive(suffix: str, tmp_path: Path) -> None:
    write_trace(TRACE, path := tmp_path / f"t{suffix}")
    args = read_trace(path).tracks[0].spans[1].args
    assert {key: (type(value), value) for key, value in args.items()} == {k: (type(v), v) for k, v in ARGS.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_trace_is_a_trace(suffix: str, tmp_path: Path) -> None:
    write_trace(Trace("", ()), path := tmp_path / f"t{suffix}")
    assert read_trace(path) == Trace("", ())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_traces_give_equal_bytes(suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(TRACE, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_hundred_thousand_spans(suffix: str, tmp_path: Path) -> None:
    """More than go into one chunk of either format, on one track."""
    spans = [Span(f"F{i}", i * 1e-6, (i + 0.5) * 1e-6, "forward", {"microbatch": i}) for i in range(100_000)]
    trace = Trace("long", (Track("compute", spans, "rank 0"), Track("other", spans[:10], "rank 0")))
    assert len(spans) >= door.PACKETS_PER_CHUNK
    write_trace(trace, path := tmp_path / f"t{suffix}")
    assert read_trace(path) == whole_nanoseconds(trace)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    spans = [
        Span("a", 0.0, 2.0, args={"n": 2**63, "x": float("nan"), "what": [1]}),  # type: ignore[dict-item]
        Span("half \ud800", 3.0, 4.0),
        Span("b", 1.0, 2.5),
    ]
    trace = Trace(
        "t",
        [
            Track("compute", spans, "rank 0"),
            Track("times", [Span("c", 2.0, 1.0), Span("d", -1.0, 1.0), Span("e", 0.0, float("inf"))]),
            Track("times", []),
        ],
        [Counter("memory", "rank 0", [(-1.0, 0.0), (0.0, float("inf"))])],
    )
    with pytest.raises(InputError) as caught:
        write_trace(trace, tmp_path / "t.pbtrace")
    path = tmp_path / "t"
    allowed = "must lie between 0 and 2,251,800 s"
    assert str(caught.value).splitlines() == [
        f"{path}.pbtrace: a trace file ends in .pftrace, .json or .json.gz (nearest: {path}.pftrace)",
        "track times: stands twice; one track of a process has this name",
        "track rank 0/compute, span 2 = b from 1.000000000 s to 2.500000000 s: starts inside a (span 0), which ends "
        "before it, at 2.000000000 s; spans of one track nest or follow one another",
        "track rank 0/compute, span 0: n = 9223372036854775808: an integer of at most 2^63 - 1 in magnitude is "
        "expected",
        "track rank 0/compute, span 0: x = nan: a finite number is expected",
        "track rank 0/compute, span 0: what = [1]: a text, an integer, a number, true or false is expected",
        "track rank 0/compute, span 1 = 'half \\ud800': a lone surrogate is not a character",
        "track times, span 0 = c from 2.000000000 s to 1.000000000 s: ends before it starts",
        f"track times, span 1 = d from -1.000000000 s to 1.000000000 s: {allowed}",
        f"track times, span 2 = e from 0.000000000 s to inf s: {allowed}",
        f"counter rank 0/memory, point 0 = -1.0 s: {allowed}",
        "counter rank 0/memory, point 1 = inf: a finite number is expected",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_crossing_below_a_nanosecond_is_noise() -> None:
    def crossing(overlap_s: float) -> Trace:
        return Trace("t", [Track("compute", [Span("a", 0.0, 1e-6 + overlap_s), Span("b", 1e-6, 2e-6)])])

    assert trace_problems(crossing(0.4e-9)) == []
    assert len(trace_problems(crossing(1.1e-9))) == 1


def test_many_faults_are_cut_short(tmp_path: Path) -> None:
    trace = Trace("t", [Track("compute", [Span("a", 1.0, 0.0)] * 5000)])
    with pytest.raises(InputError) as caught:
        write_trace(trace, tmp_path / "t.json")
    assert len(caught.value.problems) == 101


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("-", "-.pftrace"), ("t", "t.pftrace"), ("t.gz", "t.json.gz"), ("t.jsn", "t.json"), ("t.perfetto", "t.pftrace")],
)
def test_another_suffix_is_refused(name: str, nearest: str) -> None:
    for refuse in (lambda: write_trace(TRACE, name), lambda: read_trace(name)):
        with pytest.raises(InputError) as caught:
            refuse()
        assert [problem.nearest for problem in caught.value.problems] == [nearest]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_stands_there_survives_a_full_disk(suffix: str, tmp_path: Path) -> None:
    write_trace(Trace("old", ()), path := tmp_path / f"t{suffix}")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("os.fsync", side_effect=full), pytest.raises(InputError, match="written: No space left on device"):
        write_trace(TRACE, path)
    assert read_trace(path).name == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for name, words in (("absent/t.json", "No such file or directory"), ("a\0b.json", "embedded null byte")):
        with pytest.raises(InputError, match=f"json: cannot be written: {words}"):
            write_trace(TRACE, tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut_off_is_refused_wherever_that_was(suffix: str, tmp_path: Path) -> None:
    write_trace(TRACE, path := tmp_path / f"t{suffix}")
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            read_trace(path)
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize("suffix", [".pftrace", ".json"])
def test_a_damaged_file_is_a_trace_or_an_input_error(suffix: str, tmp_path: Path) -> None:
    write_trace(TRACE, path := tmp_path / f"t{suffix}")
    whole = path.read_bytes()

    @settings(deadline=None, max_examples=300)
    @given(st.dictionaries(st.integers(0, len(whole) - 1), st.integers(0, 255), min_size=1, max_size=3))
    def damage(changes: dict[int, int]) -> None:
        path.write_bytes(bytes(changes.get(place, byte) for place, byte in enumerate(whole)))
        try:
            words, problems = "", trace_problems(read_trace(path))
        except InputError as error:
            words, problems = str(error), []
        assert words.startswith(str(path)) or not words
        assert problems == []

    damage()


def _perfetto(**packet: object) -> bytes:
    message = Message()
    message.packet.add(**packet)
    message.packet.add().trace_config.unique_session_name = "foreign"
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.pftrace", b"", "does not end as Meshwright ends a trace"),
        ("t.pftrace", b'{"traceEvents": []}', "is not a Perfetto trace"),
        ("t.pftrace", _perfetto(sys_stats={}), "packet of kind sys_stats"),
        ("t.pftrace", _perfetto(track_event={"track_uuid": 5}), "track_event on no known track"),
        ("t.json", b"", "is empty"),
        ("t.json", b"[]", "a trace file holds one JSON object"),
        ("t.json", b'{"traceEvents": []}', "KeyError: 'otherData'"),
        ("t.json", b'{"otherData": {"name": "t"}, "traceEvents": [{"ph": "b", "name": "a"}]}', "of phase 'b'"),
        ("t.json", b'{"otherData": {"name": "t"}, "traceEvents": [{"ph": "X", "name": "a", "ts": 1e308, "dur": 1}]}',
         "OverflowError"),
        ("t.json.gz", b'{"traceEvents": []}', "cannot be unpacked: Not a gzipped file"),
    ],
)  # fmt: skip
def test_a_file_of_another_tool_is_refused_with_one_problem(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_trace(tmp_path / name)
    (problem,) = caught.value.problems
    assert words in problem.rule
    assert problem.where == str(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    write_trace(TRACE, tmp_path / "step.json")
    with pytest.raises(InputError, match=r"stp.json: there is no such file \(nearest: .*step.json\)"):
        read_trace(tmp_path / "stp.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder.json: cannot be read: Is a directory"):
        read_trace(tmp_path / "folder.json")


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_no_more_is_unpacked_than_allowed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_TRACE_BYTES", 1 << 20)
    blank = b" " * (1 << 20) + b"{}"
    (tmp_path / name).write_bytes(gzip.compress(blank) if name.endswith("gz") else blank)
    with pytest.raises(InputError, match=r"is longer than 1\.0 MiB"):
        read_trace(tmp_path / name)


def test_perfetto_is_loaded_only_for_its_format() -> None:
    code = "import meshwright.io.trace, sys; sys.exit('perfetto' in sys.modules or 'google.protobuf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
