"""The application that every command joins, what their options share, and the entry point."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pruning methods behind one interface, with every number a paper reports beside its reproduction.",
)
console = Console(highlight=False)

Options = Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeat for more")]
Settings = Annotated[list[str] | None, typer.Option("--config", help="setting of configs/default.yaml, key=value")]


def settings(config: Sequence[str] | None, **more: Any) -> dict[str, Any]:
    """configs/default.yaml under the `--config` options."""
    return lookup.settings({**lookup.pairs(config or []), **more})


@contextmanager
def short_lived() -> Iterator[None]:
    """For commands that load libraries, count and end: no garbage is looked for meanwhile nor at the end, which takes
    half of such a command's time (torch and timm make a million objects that all live on)."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def resumable(work: str) -> Iterator[None]:
    """Stopped by Ctrl-C, it says that the work goes on with the same command."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {work}", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point: a mistake in the input is one line and exit code 2, never a traceback."""
    try:
        if code := app(standalone_mode=False):  # of a typer.Exit; commands themselves return nothing
            sys.exit(code)
    except PrunelabError as error:
        sys.exit(_complain(error))
    except (typer.Exit, typer.Abort) as stop:
        sys.exit(getattr(stop, "exit_code", 1))
    except BrokenPipeError:  # `prunelab list | head`
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if not type(error).__module__.startswith(("click", "typer")):
            raise  # a defect of ours: the traceback is wanted
        sys.exit(_complain(error.format_message() if hasattr(error, "format_message") else error))


def _complain(error: object) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
