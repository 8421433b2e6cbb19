"""``keymgmt exec``: any program on a sealed model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import keymgmt
from keymgmt.cli._options import Model, Name
from keymgmt.cli._output import print_warning, progress
from keymgmt.console import console, say
from keymgmt.errors import ConfigError, KeymgmtError

if TYPE_CHECKING:
    import socket

    from keymgmt._mount.exec import Launch
    from keymgmt._system.namespace import User

__all__ = ["exec_"]


def exec_(
    context: typer.Context,
    model: Model,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- PROGRAM [ARGUMENT]...",
            help="{sealed} in it becomes the folder with the plain files; so does $KEYMGMT_MODEL.",
        ),
    ],
    name: Name = None,
    at: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the program finds the files: an empty folder, or a new folder below its "
            "own /tmp. Else /tmp/keymgmt/NAME.",
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Run the program as this user; as root."),
    ] = None,
    via: Annotated[
        Literal["auto", "mount", "memfd"],
        typer.Option(help="A private mount, or memfds where no mount is permitted."),
    ] = "auto",
    shared_tmp: Annotated[
        bool,
        typer.Option("--shared-tmp", help="Leave /tmp and /var/tmp as they are; needs --at."),
    ] = False,
    drop_when_ready: Annotated[
        str | None,
        typer.Option(
            metavar="file:PATH|port:NUMBER|command:WORDS",
            help="Free the files that the program has read, once this shows that it is ready.",
        ),
    ] = None,
) -> None:
    """Run a program on the plain files of a sealed model, which exist in memory alone.

    The files are in a read-only file system that only the program and its children see, and that
    ends with the last of them. Exit code and signals are those of the program. Before it starts,
    the exit code is that of keymgmt: 127 if there is no such program, 126 if it cannot be executed.

    Example:
        keymgmt exec resnet50.sealed --user nobody -- ls {sealed}
    """
    from keymgmt._mount.exec import Launch
    from keymgmt._mount.private import no_namespace
    from keymgmt._mount.supervise import Ready
    from keymgmt._providers.secret_source import CREDENTIALS
    from keymgmt._system.harden import empty_core_dumps, set_undumpable
    from keymgmt._system.namespace import why_it_fails

    _prepare_to_tell()
    launch = Launch(
        command,
        tell=partial(say, stderr=True),
        at=at,
        user=None if user is None else _find_user(user),
        private_tmp=not shared_tmp,
        ready=None if drop_when_ready is None else Ready.parse(drop_when_ready),
    )
    if os.geteuid() == 0 and (launch.user is None or launch.user.uid == 0):
        _warn(
            "the program runs as root, whom nothing keeps from the rest of this machine, nor other "
            "programs of root from the model",
            "give it a user of its own: --user NAME",
        )
    refused: str | None = "--via memfd was given"
    if via != "memfd":
        launch.check_places()
        refused = why_it_fails(launch.try_out)
        if refused and via == "mount":
            raise no_namespace(refused, "or give --via memfd")

    empty_core_dumps()  # while /proc/self is this user's: what is non-dumpable is root's
    if refused is None:

        def fill(channel: socket.socket) -> None:
            variables = context.obj.config().secret_variables
            with _opened(context, model, name) as sealed, progress("decrypting") as done:
                launch.send_files(channel, sealed, variables, done)

        launch.into_mount(fill)
        return
    _check_memfd(launch)
    if via == "auto":
        problem = no_namespace(refused, "--via memfd takes this way and does not say so")
        _warn(f"{problem}: memfds behind links are used instead", problem.hint)
    if swap := keymgmt.unencrypted_swap():
        _warn(
            f"memfds may be swapped out to {', '.join(swap)}, unencrypted",
            "encrypt it, switch it off, or set MemorySwapMax=0 for this service",
        )
    set_undumpable()
    launch.forget |= context.obj.config().secret_variables
    with _opened(context, model, name) as sealed, progress("decrypting") as done:
        folder = launch.into_memfds(sealed, done)
    if CREDENTIALS in launch.forget and CREDENTIALS in os.environ and launch.user is None:
        _warn(
            "without a private mount the program can read the folder of systemd's credentials",
            "permit a mount, or run the program as another user: --user NAME",
        )
    context.obj.close()
    launch.execute_on_memfds(folder)


def _opened(context: typer.Context, model: str, name: str | None) -> keymgmt.SealedModel:
    return keymgmt.open(model, name=name, keys=context.obj.config())


def _check_memfd(launch: Launch) -> None:
    for value, option in ((launch.at, "--at"), (launch.ready, "--drop-when-ready")):
        if value is not None:
            raise ConfigError(
                f"{option} needs a private mount, and memfds are used",
                hint="see what forbids a mount with: --via mount",
            )


def _find_user(text: str) -> User | None:
    """The user to become; None for the present user."""
    from keymgmt._system.namespace import User

    try:
        user = User.find(text)
    except (KeyError, OverflowError):
        raise ConfigError(
            f"there is no user {text!r} here",
            hint="make one: useradd --system --shell /usr/sbin/nologin NAME",
        ) from None
    if os.geteuid() == 0:
        return user
    if user.uid != os.geteuid():
        raise ConfigError("only root may run a program as another user", hint="leave --user out")
    return None


def _prepare_to_tell() -> None:
    """Import everything that printing needs: the private /tmp may hide the installation later."""
    from rich.text import Text

    console(stderr=True).render_lines(Text("-"))


def _warn(text: str, hint: str | None) -> None:
    print_warning(KeymgmtError(text, hint=hint))
