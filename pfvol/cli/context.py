"""What every command shares: the global options of one invocation, and the parameter types declared once.

A command gets ``ctx: typer.Context`` and calls ``settings(ctx)``; the REST client and the output come from there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from pfvol.cli.output import Output
from pfvol.client import Client, find_endpoint
from pfvol.config import default_data_dir
from pfvol.units import parse_size


@dataclass(frozen=True)
class Settings:
    """The global options, as given on the command line or in the environment."""

    mdm: str | None = None
    api: str | None = None
    data_dir: Path = field(default_factory=default_data_dir)
    config: Path | None = None
    out: Output = field(default_factory=Output)

    def client(self, *, timeout_seconds: float | None = None) -> Client:
        """A client of the cluster these options name; a context manager."""
        endpoint = find_endpoint(
            api=self.api,
            mdm=self.mdm,
            token=os.environ.get("PFVOL_TOKEN") or None,
            data_dir=self.data_dir,
            config=self.config,
        )
        return Client(endpoint) if timeout_seconds is None else Client(endpoint, timeout_seconds=timeout_seconds)


def settings(ctx: typer.Context) -> Settings:
    found = ctx.find_object(Settings)
    if found is None:
        raise RuntimeError("a command ran without the application's callback")
    return found


def noun(help_text: str) -> typer.Typer:
    """The commands of one noun."""
    return typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode=None, add_completion=False)


def size_bytes(text: str) -> int:
    """A size as people type it; ``InvalidError`` says what would have been right."""
    return parse_size(text)


PdArgument = Annotated[str, typer.Argument(metavar="PD", help="Protection domain, by name or id.", show_default=False)]
PoolArgument = Annotated[str, typer.Argument(metavar="POOL", help="Pool, by name or id.", show_default=False)]
FaultSetArgument = Annotated[
    str, typer.Argument(metavar="FAULT_SET", help="Fault set, by name or id.", show_default=False)
]
SdsArgument = Annotated[str, typer.Argument(metavar="SDS", help="SDS, by name or id.", show_default=False)]
SdcArgument = Annotated[str, typer.Argument(metavar="SDC", help="SDC, by name or id.", show_default=False)]
VolumeArgument = Annotated[str, typer.Argument(metavar="VOL", help="Volume, by name or id.", show_default=False)]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="1 to 31 of A-Z a-z 0-9 _ . -", show_default=False)]
CapacityArgument = Annotated[
    str, typer.Argument(metavar="CAPACITY", help="A size such as 2GiB, 800MB or 1.5T.", show_default=False)
]
SizeArgument = Annotated[
    str, typer.Argument(metavar="SIZE", help="A size such as 2GiB, 800MB or 1.5T.", show_default=False)
]
PdOption = Annotated[str | None, typer.Option("--pd", help="Only of this protection domain.")]
