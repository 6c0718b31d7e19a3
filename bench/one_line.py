"""What the command line says in lines: plain text, and how a verb ends where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bench.errors import BenchError
from methods.registry import MethodError

errors = Console(stderr=True, soft_wrap=True)


def one_line_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """What the user can put right is one line and exit code 2; an interrupt is 130."""

    @wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt:
            errors.print("[yellow]interrupted[/yellow]; the same command goes on where this one stopped")
            raise typer.Exit(130) from None
        except (BenchError, MethodError) as error:
            errors.print(f"[red]error:[/red] {escape(str(error))}")
            raise typer.Exit(2) from None

    return wrapped


def say(console: Console, text: str, style: str = "", soft_wrap: bool = False) -> None:
    """Print plain text: a method expression's [brackets] are no markup."""
    console.print(Text(text, style=style), highlight=False, soft_wrap=soft_wrap)
