"""`mplug chat MODEL [CLIP]`: talks to a model about videos and images in the terminal."""

import readline  # noqa: F401  # line editing and history for input()
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from model.errors import DataError, UserError
from model.mplug_owl_video.chat import Chat
from model.mplug_owl_video.configuration import MplugOwlConfig
from model.pretrained import load_pretrained

HELP = """\
/video PATH   show a clip with the next question
/image PATH   show an image with the next question
/reset        start a new conversation
/help         this list
/quit         leave; so does Ctrl-D. Ctrl-C stops an answer."""


def run_chat(model: str, clip: str, num_frames: int | None, max_tokens: int, options: dict[str, Any]) -> None:
    """Answers the lines of the terminal or of a pipe until they end. `options` are those of `generate`."""
    try:
        chat = Chat(*load_pretrained(model, [MplugOwlConfig.model_type]))
        if clip:
            chat.show_video(clip, num_frames)
    except UserError:
        raise
    except ValueError as error:  # of the clip
        raise DataError(str(error)) from error
    console = Console(highlight=False, markup=False)
    commands: dict[str, Callable[[str], None]] = {
        "/video": lambda path: chat.show_video(path, num_frames),
        "/image": chat.show_image,
        "/reset": lambda _: chat.reset(),
        "/help": lambda _: console.print(HELP),
    }
    if sys.stdin.isatty():
        console.print(HELP + "\n")
    while (line := _read_line()) is not None:
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return
        try:
            if command.startswith("/"):
                commands.get(command, commands["/help"])(argument.strip())
            elif line.strip():
                chat.ask(line.strip(), _print_now, max_tokens, **options)
                print(flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", flush=True)
        except (ValueError, UserError) as error:
            console.print(f"error: {error}", style="red")


def _read_line() -> str | None:
    """The next line; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


def _print_now(text: str) -> None:
    print(text, end="", flush=True)
