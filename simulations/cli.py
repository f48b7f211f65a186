"""The command line: ``fedkn COMMAND``. A command is a function of its own in simulations/commands.

Exit codes: 0 all is well, 1 the run or some of its cells failed, 2 bad input (nothing was written),
130 stopped by Ctrl-C. 1 is also the
code of a command that could do a part of what was asked, such as classify most of the images.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer

from fedkn import __version__
from fedkn.errors import FedknError, UserError
from fedkn.text import printable
from simulations.commands.bench import bench
from simulations.commands.compare import compare
from simulations.commands.demo import demo
from simulations.commands.deploy import deploy
from simulations.commands.device import device
from simulations.commands.doctor import doctor
from simulations.commands.export import export
from simulations.commands.export_table import export_table
from simulations.commands.partition import partition
from simulations.commands.predict import predict
from simulations.commands.publish import publish
from simulations.commands.report import report
from simulations.commands.reproduce import reproduce
from simulations.commands.resume import resume
from simulations.commands.run import run
from simulations.terminal import plain_where_needed

__all__ = ["app", "main"]

_LONGEST = 4000

app = typer.Typer(
    name="fedkn",
    help="Train image models across devices whose batches are tiny, and find out which normalizer "
    "to use.\n\nStart with: fedkn demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedkn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Hold what may stand before a command."""


_COMMANDS = (
    *(demo, compare, run, resume, reproduce, report, publish, export_table, export, predict),
    *(partition, doctor),
)
for command in _COMMANDS:
    app.command()(command)
app.add_typer(bench, name="bench")
app.add_typer(deploy, name="deploy")
app.add_typer(device, name="device")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; errors are one line on standard error, unless --debug."""
    plain_where_needed()
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_exit_code(given))


def _exit_code(arguments: list[str]) -> int:
    debug, log = "--debug" in arguments, logging.getLogger("flwr")
    if not debug:
        # Flower's strategies announce their settings as warnings. A filter, because Flower sets its
        # logger's level when it is imported.
        log.addFilter(_is_error)
    try:
        code = app(arguments, prog_name="fedkn", standalone_mode=False, obj=arguments)
    except Exception as error:
        if debug:
            raise
        return _explained(error)
    finally:
        log.removeFilter(_is_error)
    return code if isinstance(code, int) else 0


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _explained(error: Exception) -> int:
    """Print `error` in one line and return the exit code that goes with it."""
    message, code = str(error), 1
    match error:
        case BrokenPipeError():
            # The reader of our output has had enough, as in `fedkn … | head`.
            return 0
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), file=sys.stdout)
            return 0
        case click.Abort():
            message, code = "stopped", 130
        case click.ClickException():
            message, code = error.format_message(), 2
        case UserError():
            code = 2
        case FedknError():
            pass
        case _:
            message = f"{type(error).__name__}: {error} (--debug shows where)"
    # Given the stream, click does not put one of its own in its place.
    click.echo(f"fedkn: {printable(message, _LONGEST)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
