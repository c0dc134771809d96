"""The command line as a function: what `meshwright ...` prints and its exit status, without a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from meshwright import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def meshwright(*words: object, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Outcome:
    """Run `meshwright WORDS`; stdin, stdout and stderr are pipes as far as the command can tell."""
    streams = {
        "out": io.TextIOWrapper(io.BytesIO(), "utf-8"),
        "err": io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace"),  # as Python opens it
    }
    with (
        mock.patch.object(sys, "argv", ["meshwright", *map(str, words)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")),
        mock.patch.dict(os.environ, {"COLUMNS": "100", **(env or {})}),
        contextlib.redirect_stdout(streams["out"]),
        contextlib.redirect_stderr(streams["err"]),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    texts = {}
    for name, stream in streams.items():
        stream.flush()
        texts[name] = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    return Outcome(code, texts["out"], texts["err"])
