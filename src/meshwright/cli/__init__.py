"""The command line: thin commands over the floors below, one file for those that belong together.

stdout is the result, stderr is progress and errors. Exit status: 0 answered, 1 answered "no" (nothing fits, a check
failed), 2 wrong input, 130 interrupted. Everything heavy is imported by the command that needs it.
"""

# ruff: noqa: I001
from __future__ import annotations

import sys

from meshwright.cli.common import app

# Commands register in the order in which --help lists them.
from meshwright.cli import plan as _plan  # noqa: F401
from meshwright.cli import predict as _predict  # noqa: F401
from meshwright.cli import simulate as _simulate  # noqa: F401
from meshwright.cli import solve as _solve  # noqa: F401
from meshwright.cli import measured as _measured  # noqa: F401
from meshwright.cli import listing as _listing  # noqa: F401

#: What commands need beside the package itself, and the extra that installs it.
EXTRAS = {
    "torch": "run",
    "scipy": "fit",
    "plotly": "report",
    "perfetto": "trace",
    "ortools": "auto",
    "onnx": "onnx",
    "pymetis": "metis",
}


def main() -> None:
    """Run the command line; bad input ends with one clear message and status 2."""
    from meshwright.errors import InputError, MeshwrightError, is_interrupt

    try:
        app()
    except InputError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in error.problems))
        sys.exit(2)
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        sys.stderr.write(f"error: this needs {missing}: pip install 'meshwright[{EXTRAS[missing]}]'\n")
        sys.exit(2)
    except (KeyboardInterrupt, SystemError) as error:
        if not is_interrupt(error):
            raise
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
