"""The ``pfvol`` program: global options, which module holds which command, and how every failure ends.

Promises the exit codes of ``pfvol.errors``: an expected error is one line that says what to do; anything else is a bug,
exit 1, with its traceback under ``-v``. Modules of the nouns are imported when their command is run, so that a command
pays for itself only.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pfvol import __version__
from pfvol.cli.context import Settings
from pfvol.cli.output import Output
from pfvol.config import default_data_dir
from pfvol.errors import EXIT_BUG, EXIT_USAGE, Error

EXIT_INTERRUPTED = 130

# Typer keeps its own copy of Click's exceptions; these two are the bases of what it raises for a wrong command line.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ParserError: type[Exception] = typer.BadParameter.__mro__[2]

GLOBAL_OPTIONS = ("--mdm", "--api", "--data-dir", "--config", "--no-color", "-q", "--quiet", "-v", "--verbose")

# command: (module, attribute, line of `pfvol --help`)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "mount": ("pfvol.cli.mount", "mount", "Show the mapped volumes as files under a mountpoint."),
    "umount": ("pfvol.cli.mount", "umount", "Unmount, after dirty data has been written."),
    "cluster": ("pfvol.cli.cluster", "app", "A local cluster, one process per node."),
    "node": ("pfvol.cli.node", "app", "Run one node."),
    "pd": ("pfvol.cli.pd", "app", "Protection domains."),
    "fault-set": ("pfvol.cli.fault_set", "app", "Fault sets: servers that fail together."),
    "pool": ("pfvol.cli.pool", "app", "Storage pools."),
    "sds": ("pfvol.cli.sds", "app", "Storage servers."),
    "sdc": ("pfvol.cli.sdc", "app", "Clients that mount volumes."),
    "vol": ("pfvol.cli.vol", "app", "Volumes: create, map, extend, verify."),
    "event": ("pfvol.cli.event", "app", "What happened in the cluster."),
    "system": ("pfvol.cli.system", "app", "The cluster as a whole."),
}


class LazyGroup(TyperGroup):
    """The commands of ``COMMANDS``, each imported when it is asked for."""

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _help = COMMANDS[cmd_name]
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            wrapper = typer.Typer(add_completion=False, rich_markup_mode=None)
            wrapper.command()(found)
            found = wrapper
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As Click does, but a wrong name is told from ``COMMANDS`` without importing anything."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}"
            raise UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_module, _attribute, text) in COMMANDS.items()])


app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None, no_args_is_help=True)


def _print_version(value: bool) -> None:
    if value:
        print(f"pfvol {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    mdm: Annotated[
        str | None, typer.Option("--mdm", metavar="HOST:PORT", envvar="PFVOL_MDM", help="The MDM's control address.")
    ] = None,
    api: Annotated[
        str | None, typer.Option("--api", metavar="URL", envvar="PFVOL_API", help="The REST API; token in PFVOL_TOKEN.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", envvar="PFVOL_DATA_DIR", help="Where the local cluster lives."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", envvar="PFVOL_CONFIG", help="A node's configuration.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours (also NO_COLOR).")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only data and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks and more logging.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Replicated block volumes as files: mount them, and administer the cluster that keeps them."""
    del version
    color = not (no_color or os.environ.get("NO_COLOR"))
    ctx.obj = Settings(
        mdm=mdm,
        api=api,
        data_dir=data_dir or default_data_dir(),
        config=config,
        out=Output(json=as_json, color=color, quiet=quiet, verbose=verbose),
    )


def hoist_json(args: Sequence[str]) -> list[str]:
    """``--json`` may stand anywhere before ``--``: people append it to the command they just ran."""
    end = args.index("--") if "--" in args else len(args)
    rest = [arg for arg in args[:end] if arg != "--json"]
    found = ["--json"] if len(rest) < end else []
    return [*found, *rest, *args[end:]]


def run(args: Sequence[str]) -> int:
    """One invocation; returns its exit code."""
    arguments = hoist_json(args)
    out = Output(json="--json" in arguments[:1], verbose=bool({"-v", "--verbose"} & set(arguments)))
    try:
        status = typer.main.get_command(app).main(arguments, prog_name="pfvol", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except Error as error:
        out.raised(error)
        if out.verbose:
            traceback.print_exc()
        return error.exit_code
    except ParserError as error:
        return _usage(out, error)
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); a second failure at interpreter exit would be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        hint = "" if out.verbose else "; run it again with -v for the traceback, and report it"
        out.error("internal", f"a bug: {type(error).__name__}: {error}{hint}", {})
        if out.verbose:
            traceback.print_exc()
        return EXIT_BUG


def _usage(out: Output, error: Any) -> int:
    """A wrong command line in one line, ending in where its help is."""
    command = getattr(getattr(error, "ctx", None), "command_path", "pfvol")
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        out.error("usage", "a command is missing", {"command": command})
        return EXIT_USAGE
    message = " ".join(error.format_message().split()).rstrip(".?")
    if getattr(error, "option_name", None) in GLOBAL_OPTIONS:
        message += ", which is a global option: it goes before the command"
    out.error("usage", f"{message}; see `{command} --help`", {"command": command})
    return EXIT_USAGE


def main() -> None:
    sys.exit(run(sys.argv[1:]))
