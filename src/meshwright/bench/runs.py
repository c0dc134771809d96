"""Published runs in: rows of a CSV, typed, each cell checked.

A `Row` keeps what says who ran it and what was measured apart from its `Setup`, all that a prediction may depend on.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from meshwright.cluster import MAX_DEVICES
from meshwright.engine import engine_names
from meshwright.errors import InputError, MeshwrightError, Problem, nearest_name
from meshwright.strategy import Recompute
from meshwright.units import GiB
from meshwright.workload import PRECISION_NAMES

# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a row says of how the run was made: all that its prediction may depend on. None and '' are blank cells."""

    model: str
    layers: int
    hidden: int
    ffn_hidden: int | None
    heads: int
    kv_heads: int | None
    vocab: int
    seq_len: int
    params_b: float | None
    experts: int | None
    topk: int | None
    engine: str
    accelerator: str
    accelerator_memory_gb: float | None
    n_devices: int
    devices_per_node: int | None
    intra_node_net: str
    inter_node_net: str
    dp: int | None
    tp: int | None
    pp: int | None
    cp: int | None
    ep: int | None
    vpp: int | None
    sequence_parallel: str
    zero_stage_or_fsdp: str
    microbatch_size: int | None
    global_batch_size: int
    recompute: str
    precision: str
    flash_attention: str
    schedule: str


@dataclass(frozen=True)
class Row:
    """A sound row: where it stands, who published it, what was measured (None: not printed), and its setup."""

    line: int
    id: str
    source: str
    step_time_s: float | None
    peak_memory_bytes: float | None
    setup: Setup


@dataclass(frozen=True)
class Skipped:
    """A row that is not predicted, and why."""

    line: int
    id: str
    reason: str


class NotExpressible(MeshwrightError):
    """A run that no strategy of ours describes; the message is the reason."""


@dataclass(frozen=True)
class _Column:
    """How a cell is read: `parse` gives its value or raises `ValueError` with the rule, `blank` that of a blank one,
    which `needed` forbids."""

    parse: Callable[[str], Any]
    needed: bool = False
    blank: str | None = None


def _words(text: str) -> str:
    return text


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(value):
        raise ValueError("must be finite")
    if not 0 < value <= 1e15:
        raise ValueError("must be positive, and at most 1e15")
    return value


def _count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = _number(text)
        if value != int(value):
            raise ValueError("must be a whole number")
        if value > most:
            raise ValueError(f"must be at most {most:,}")
        return int(value)

    return parse


def _one_of(known: Iterable[str]) -> Callable[[str], str]:
    names = tuple(known)

    def parse(text: str) -> str:
        if text not in names:
            nearest = nearest_name(text, names)
            raise ValueError(f"known: {', '.join(names)}" + (f" (nearest: {nearest})" if nearest else ""))
        return text

    return parse


def _state_words(text: str) -> str:
    read_state(text)
    return text


def _precision_words(text: str) -> str:
    read_precision(text)
    return text


def read_rows(path: str) -> Iterator[Row | Skipped]:
    """The rows of a CSV in order, the bad ones with line, column and reason; raises `InputError` where none can be.

    Lines are counted from 1, the header's; a byte-order mark and mixed line ends are taken as they come.
    """
    try:
        # Bytes that are no UTF-8 become replacement characters, which no column of numbers takes.
        with Path(path).open(encoding="utf-8-sig", errors="replace", newline="") as file:
            yield from _typed_rows(csv.reader(file), path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError([Problem(path, "", f"cannot be read: {reason}")]) from None


def _typed_rows(reader: Any, path: str) -> Iterator[Row | Skipped]:
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield Skipped(line, f"line {line}", f"line {line}: is no CSV: {error}")
            continue
        if header and cells:
            yield _row(line, header, cells)
        elif cells:
            header = [name.strip() for name in cells]
            _check_header(header, path)
    if not header:
        raise InputError([Problem(path, "", "is empty: no header")])


def _check_header(header: Sequence[str], path: str) -> None:
    problems = [
        Problem(f"{path}: header", name, "this column is missing", nearest_name(name, header))
        for name in (field.name for field in fields(Setup))
        if name not in header
    ]
    problems += [
        Problem(f"{path}: header", name, "names more than one column")
        for name in dict.fromkeys(header)
        if header.count(name) > 1
    ]
    if problems:
        raise InputError(problems)


def _row(line: int, header: Sequence[str], cells: Sequence[str]) -> Row | Skipped:
    named = dict(zip(header, (cell.strip().replace("\0", "?") for cell in cells), strict=False))
    known_as = named.get("id", "") or f"line {line}"
    if len(cells) != len(header):
        return Skipped(line, known_as, f"line {line}: {len(cells)} cells, the header has {len(header)}")
    values: dict[str, Any] = {}
    faults = []
    for name, column in COLUMNS.items():
        text = named.get(name, "")
        try:
            values[name] = _value(text, column)
        except ValueError as error:
            shown = f"{text[:60]!r} " if text else ""
            faults.append(f"column {name}: {shown}{error}")
    if not faults:
        faults += _layout_faults(values)
    if faults:
        return Skipped(line, known_as, f"line {line}, " + "; ".join(faults))
    memory_gib = values.pop("peak_memory_gib")
    step_time_s = values.pop("step_time_s")
    memory_bytes = None if memory_gib is None else memory_gib * GiB
    return Row(line, known_as, named.get("source", ""), step_time_s, memory_bytes, Setup(**values))


def _value(text: str, column: _Column) -> Any:
    if text:
        return column.parse(text)
    if column.needed:
        raise ValueError("is blank, and nothing documents a default")
    return column.blank


#: More stages than this are a slip of the finger.
MAX_STAGES = 100_000


def _layout_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """A layout that is not there, or whose degrees do not make the devices."""
    num_stages = (values["pp"] or 1) * (values["vpp"] or 1)
    if num_stages > MAX_STAGES:
        yield f"column vpp: pp*vpp = {num_stages}, more than {MAX_STAGES:,} stages"
    degrees = {name: values[name] for name in ("dp", "tp", "pp", "cp")}
    if degrees["dp"] is None and degrees["tp"] is None and degrees["pp"] is None:
        if values["n_devices"] > 1:
            yield "column dp: the row has no layout (dp, tp and pp are blank)"
        return
    product = math.prod(degree or 1 for degree in degrees.values())
    num_devices = values["n_devices"]
    if degrees["dp"] is None and num_devices % product == 0:
        return  # the devices say it
    if product != num_devices:
        yield f"column n_devices: {num_devices}, but dp*tp*pp*cp = {product}"


# --- vocabulary -----------------------------------------------------------------------------------------------------


#: The presets that have an accelerator, the usual one first.
ACCELERATORS = {
    "A100": ("dgx-a100", "dgx-a100-40g"),
    "H100": ("dgx-h100",),
    "H200": ("dgx-h200",),
    "B200": ("dgx-b200",),
    "B300": ("dgx-b300",),
    "GB200": ("gb200-nvl72",),
    "GB300": ("gb300-nvl72",),
    "V100": ("dgx-v100",),
    "TPUv4": ("tpu-v4",),
    "TPUv5e": ("tpu-v5e",),
    "TPUv5p": ("tpu-v5p",),
    "Trainium1 NeuronCore-v2": ("trainium1",),
    "Ascend910B": ("ascend-910b",),
    "Gaudi2": ("gaudi2",),
}

#: Words of the schedule column.
SCHEDULE_WORDS = ("1f1b", "interleaved_1f1b", "interleaved_1f1b (modified)", "zero_bubble_1p", "zero_bubble_2p")

#: Words of the precision column beside those of the command line: the type computed in, and that of the layers'
#: products where it is another.
PRECISIONS = {
    **PRECISION_NAMES,
    "amp_bf16": ("bfloat16", ""),
    "bf16 compute, fp32 weights": ("bfloat16", ""),
    "Autocast:BF16+FP32Optimizer": ("bfloat16", ""),
    "Autocast:BF16+SR": ("bfloat16", ""),
    "fp8-cs": ("bfloat16", "float8"),
    "fp8-mx": ("bfloat16", "float8"),
    "amp_fp8": ("bfloat16", "float8"),
    "float8(linear)+bf16": ("bfloat16", "float8"),
    "int8 quantized matmuls (AQT) + bf16": ("bfloat16", "int8"),
}


def read_precision(text: str) -> tuple[str, str]:
    """The type computed in and, where it is another, that of the linear layers' products.

    >>> read_precision("fp8"), read_precision("amp_bf16")
    (('bfloat16', 'float8'), ('bfloat16', ''))
    """
    _one_of(PRECISIONS)(text)
    return PRECISIONS[text]


def read_state(text: str) -> tuple[int, int]:
    """ZeRO level and size of the shard group (0: all data-parallel ranks) of the `zero_stage_or_fsdp` column.

    >>> read_state("1(shard group 8)"), read_state("fsdp_full_shard(zero3)"), read_state("fsdp16 [node] x dp4 [net]")
    ((1, 8), (3, 0), (3, 16))
    """
    if match := re.fullmatch(r"([0-3])(?:\(shard group (\d+)\))?", text):
        return int(match[1]), int(match[2] or 0)
    if match := re.match(r"fsdp(\d+)\b.*\bx dp\d+", text):
        return 3, int(match[1])
    if match := re.match(r"(?:hsdp|megatron_fsdp) ?\(shard (\d+)", text):
        return 3, int(match[1])
    if text.startswith("fsdp"):
        return (2, 0) if "zero2" in text else (3, 0)
    raise ValueError("must be 0-3, '1(shard group K)', or an FSDP mode such as 'fsdp_full_shard(zero3)'")


_NEEDED = True
COLUMNS: dict[str, _Column] = {
    "model": _Column(_words, blank=""),
    "layers": _Column(_count(10_000), _NEEDED),
    "hidden": _Column(_count(10**6), _NEEDED),
    "ffn_hidden": _Column(_count(10**7)),
    "heads": _Column(_count(10**5), _NEEDED),
    "kv_heads": _Column(_count(10**5)),
    "vocab": _Column(_count(10**8), _NEEDED),
    "seq_len": _Column(_count(10**9), _NEEDED),
    "params_b": _Column(_number),
    "experts": _Column(_count(10**6)),
    "topk": _Column(_count(10**6)),
    "engine": _Column(_one_of(engine_names()), blank=""),
    "accelerator": _Column(_one_of(ACCELERATORS), _NEEDED),
    "accelerator_memory_gb": _Column(_number),
    "n_devices": _Column(_count(MAX_DEVICES), _NEEDED),
    "devices_per_node": _Column(_count(10**5)),
    "intra_node_net": _Column(_words, blank=""),
    "inter_node_net": _Column(_words, blank=""),
    "dp": _Column(_count(MAX_DEVICES)),
    "tp": _Column(_count(10**5)),
    "pp": _Column(_count(10**4)),
    "cp": _Column(_count(10**5)),
    "ep": _Column(_count(10**6)),
    "vpp": _Column(_count(1000)),
    "sequence_parallel": _Column(_one_of(("y", "n")), blank=""),
    "zero_stage_or_fsdp": _Column(_state_words, blank=""),
    "microbatch_size": _Column(_count(10**6)),
    "global_batch_size": _Column(_count(10**9), _NEEDED),
    "recompute": _Column(_one_of([kind.value for kind in Recompute]), blank=""),
    "precision": _Column(_precision_words, blank=""),
    "flash_attention": _Column(_one_of(("y", "n", "unknown")), blank=""),
    "schedule": _Column(_one_of(SCHEDULE_WORDS), blank=""),
    "step_time_s": _Column(_number),
    "peak_memory_gib": _Column(_number),
}
