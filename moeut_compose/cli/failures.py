"""How a command fails: one clear line on stderr for each problem, and an exit code that scripts can rely on.

0 done; 1 the work failed; 2 wrong usage or not found; 130 after Ctrl-C; 143 after SIGTERM.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from moeut_compose.data.errors import DataError
from moeut_compose.spec.find import NotFound
from moeut_compose.spec.problems import SpecError
from moeut_compose.train.errors import TrainError

FAILED = 1
USAGE = 2


def complain(text: str, *, is_shared: bool = True) -> None:
    """Say something on stderr; of several processes the main one alone says what all of them have to say."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(text, file=sys.stderr, flush=True)
    elif not is_shared:
        print(f"rank {rank}: {text}", file=sys.stderr, flush=True)


class Commands(TyperGroup):
    """The commands, and what becomes of the errors that they expect."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run; what a terminal's encoding lacks is shown as a question mark."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an expected error becomes its message and an exit code, never a traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except SpecError as error:
            complain(str(error))
            raise typer.Exit(FAILED) from None
        except NotFound as error:
            complain(f"error: {error}")
            raise typer.Exit(USAGE) from None
        except TrainError as error:
            complain(f"error: {error}", is_shared=error.is_shared)
            raise typer.Exit(error.exit_code) from None
        except DataError as error:
            complain(f"error: {error}", is_shared=False)
            raise typer.Exit(FAILED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `head` does
            raise typer.Exit(0) from None
        except OSError as error:
            complain(f"error: {describe_os_error(error)}", is_shared=False)
            raise typer.Exit(FAILED) from None
        return result


@contextmanager
def leaving_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: while torch is imported, an exception could come out as any other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{(error.strerror or str(error)).lower()}"


def wrong_usage(message: str) -> typer.Exit:
    """Complain; the result is to be raised."""
    complain(f"error: {message}")
    return typer.Exit(USAGE)


def failed(message: str) -> typer.Exit:
    """Complain; the result is to be raised."""
    complain(f"error: {message}")
    return typer.Exit(FAILED)
