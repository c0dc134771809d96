"""Draw `docs/plan.svg`: what `meshwright plan` prints in a terminal of 100 columns.

python docs/picture.py
"""

import sys
from pathlib import Path

import rich.console

from meshwright import cli

COMMAND = "meshwright plan llama-3-70b dgx-h100x8 --global-batch 256 --seq-len 8192 --top 5"


def main() -> None:
    """Run the command with a console that records."""
    plain = rich.console.Console
    console = plain(record=True, width=100, force_terminal=True, highlight=False)
    rich.console.Console = lambda stderr=False, **_: plain(stderr=True) if stderr else console  # type: ignore[misc]
    sys.argv = COMMAND.split()
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    svg = console.export_svg(title=COMMAND)
    # The web font of Rich's template would be fetched: a reader's own monospace font does.
    start, stop = svg.index("@font-face"), svg.index(".terminal", svg.rindex("@font-face"))
    svg = svg[:start] + svg[stop:].replace("Fira Code, monospace", "monospace")
    Path(__file__).with_name("plan.svg").write_text(svg)


if __name__ == "__main__":
    main()
