"""The tokens of every step: synthetic by seed, or out of a file. They never depend on the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshwright.errors import InputError, Problem
from meshwright.workload import Workload

#: Suffixes of token files without a header, and the type of their numbers.
RAW_SUFFIXES: Mapping[str, Any] = {".bin": np.uint16, ".uint16": np.uint16, ".uint32": np.uint32}


@dataclass(frozen=True)
class Data:
    """Where the tokens come from: `path`, or drawn by `seed` where there is none."""

    workload: Workload
    vocab: int
    seed: int
    path: str | None = None

    def inputs(self, step: int) -> dict[str, Tensor]:
        """`tokens` and `labels` (the next tokens) of one step, each global batch x sequence."""
        batch, seq = self.workload.global_batch, self.workload.seq_len
        if self.path is None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = torch.randint(self.vocab, (batch, seq + 1), generator=generator)
        else:
            tokens = open_tokens(self.path)
            start = step * batch * seq
            run = torch.from_numpy(np.array(tokens[start : start + batch * seq + 1], dtype=np.int64))
            rows = run.unfold(0, seq + 1, seq)
        return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def open_tokens(path: str) -> Any:
    """The tokens of a file as an array that is read when indexed; raises `InputError` for anything else."""
    file = Path(path)
    if not file.is_file():
        raise InputError([Problem("tokens", path, "no such file")])
    if file.suffix in RAW_SUFFIXES:
        width = np.dtype(RAW_SUFFIXES[file.suffix]).itemsize
        if file.stat().st_size == 0 or file.stat().st_size % width:
            rule = f"must be whole numbers of {width} bytes, not {file.stat().st_size} bytes"
            raise InputError([Problem("tokens", path, rule)])
        return np.memmap(file, dtype=RAW_SUFFIXES[file.suffix], mode="r")
    if file.suffix != ".npy":
        known = ", ".join((".npy", *RAW_SUFFIXES))
        raise InputError([Problem("tokens", path, f"the suffix says what is in it: {known} (raw: 16 or 32 bits)")])
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InputError([Problem("tokens", path, f"is not an array of numbers: {error}")]) from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        rule = f"must be one row of whole numbers, not {tokens.dtype} of shape {tokens.shape}"
        raise InputError([Problem("tokens", path, rule)])
    return tokens


def check_tokens(path: str, vocab: int, workload: Workload, steps: int) -> None:
    """Raise `InputError` where a file has too few tokens for the run or one that the model does not know."""
    tokens = open_tokens(path)
    needed = steps * workload.tokens + 1
    if len(tokens) < needed:
        possible = (len(tokens) - 1) // workload.tokens
        rule = f"{steps} steps of {workload.tokens} tokens need {needed}"
        raise InputError([Problem("tokens", f"{len(tokens)} in {path}", rule, f"--steps {possible}")])
    used = tokens[:needed]
    low, high = int(used.min()), int(used.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise InputError([Problem("tokens", f"{wrong} in {path}", f"must be from 0 to {vocab - 1}, the vocabulary")])
