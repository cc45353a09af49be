"""The `remelt` command. Exit status 2 and one line for what the user can mend; anything else keeps its traceback."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from remelt import __version__
from remelt.errors import RemeltError
from remelt_jobs import merge_commands, report_commands, search_commands, select_commands, status_command

app = typer.Typer(
    name="remelt",
    help="Merge checkpoints of any size tensor by tensor, score what comes out, and search the coefficients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_UsageError: Any = typer.BadParameter.__base__
"""A command line that cannot be read; typer has no public name for it."""


def _print_version(value: bool) -> None:
    if value:
        print(f"remelt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Takes what comes before the command."""


app.command("plan")(merge_commands.plan)
app.command("merge")(merge_commands.merge)
app.command("verify")(merge_commands.verify)
app.command("inspect")(merge_commands.inspect)
app.command("diff")(merge_commands.diff)
app.command("operators")(merge_commands.operators)
app.command("evaluate")(search_commands.evaluate)
app.command("search")(search_commands.search)
app.command("select")(select_commands.select)
app.add_typer(report_commands.app)
app.command("status")(status_command.status)
app.command("demo")(search_commands.demo)


_INTERRUPTED = 128 + signal.SIGINT
_received: list[int] = []
"""Signals that ended the command; SIGINT is not among them, it comes as KeyboardInterrupt."""


def main() -> None:
    """Entry point of the console script."""
    # What the imports and the loading of kernels leave behind is kept: collecting it again and again takes 0.1 s.
    gc.set_threshold(100_000)
    signal.signal(signal.SIGTERM, _end_in_order)
    try:
        status = app(standalone_mode=False)
    except RemeltError as error:
        _refuse(str(error))
    except _UsageError as error:
        if not sys.argv[1:]:
            error.show()
            _exit(2)
        command = error.ctx.command_path if error.ctx else "remelt"
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does.
        _exit(0)
    except OSError as error:
        # A file where a folder belongs, a full disk, no permission: of whatever place it is the user's to mend.
        if error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}; check the path, its permissions and the disk")
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        _stopped(128 + (_received[0] if _received else signal.SIGINT))
    # A command returns nothing; what ended by typer.Exit comes back as its status.
    _exit(status or 0)


def _end_in_order(number: int, frame: object) -> NoReturn:
    """SIGTERM, as job schedulers send it: unwind, so that leases are released and what was started is ended."""
    _received.append(number)
    # Of all exceptions from a handler, Ray's calls let this one through.
    raise KeyboardInterrupt


def _stopped(status: int) -> NoReturn:
    long = {"merge", "search", "select", "demo"} & set(sys.argv[1:2])
    print("remelt: stopped" + ("; run the same command again to go on" if long else ""), file=sys.stderr)
    _exit(status)


def _refuse(message: str) -> NoReturn:
    # One line, whatever a file name or another library's error brought into it.
    print(f"remelt: {' '.join(message.splitlines())}", file=sys.stderr)
    _exit(2)


def _exit(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
