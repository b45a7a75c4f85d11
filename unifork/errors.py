"""The errors a user can meet. Each message names the value, the place and what is allowed."""

import errno
import os
import signal
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec


class UniForkError(Exception):
    """A mistake in the input, the configuration or the state on disk; never a bug of the program."""


class ConfigError(UniForkError):
    """A configuration, card, plan or command line that cannot be used."""


class DataError(UniForkError):
    """A shard, manifest or image that is missing, damaged or of another kind than promised."""


class MachineError(DataError):
    """A disk that takes nothing more, a network that answers nothing: no other shard would fare better."""


class IdentityError(UniForkError):
    """Codes, codebooks or encoders that do not belong together."""


class ChangedFile(DataError):
    """A file that is gone, or another than the one that was planned with; planning again is what helps."""


class CheckpointError(UniForkError):
    """A checkpoint that is incomplete, damaged or belongs to another run."""


class Stopped(SystemExit):
    """A signal asked the program to end. Every finished step is saved; the exit code is 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name}: every finished step is saved; the same command goes on"


def unknown(what: str, name: str, choices: Iterable[str], place: str = "") -> ConfigError:
    """The error for a name outside a fixed set, with the nearest known names first."""
    where = f"{place}: " if place else ""
    names = sorted(choices)
    near = get_close_matches(name, names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ConfigError(f"{where}unknown {what} {name!r}.{hint} Known: {', '.join(names) or '(none)'}.")


def one_of(what: str, name: str, choices: Collection[str], place: str = "") -> str:
    """A name of a fixed set. Raises the ConfigError of `unknown` for any other."""
    if name not in choices:
        raise unknown(what, name, choices, place)
    return name


def check_extra(package: str, extra: str, place: str) -> None:
    """Raise ConfigError where a package is not installed, with the extra that brings it."""
    if find_spec(package) is None:
        raise ConfigError(f"{place}: needs {package}, which is not installed: pip install 'unifork[{extra}]'")


@contextmanager
def refusing(kind: type[UniForkError], where: object, *errors: type[BaseException]) -> Iterator[None]:
    """Raise an error of a kind, which begins with `where`, for any of some others; those of libraries name no place."""
    try:
        yield
    except errors as error:
        raise kind(f"{where}: {error}") from None


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What an operating system says of a full, read-only or forbidden disk."""
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)
"""And of a file where a folder should be."""


@contextmanager
def writing(path: os.PathLike[str] | str) -> Iterator[None]:
    """Raise MachineError, which names the place and the way on, where a disk takes nothing more."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE + IN_THE_WAY:
            raise
        raise MachineError(
            f"{os.fspath(path)}: cannot be written: {os.strerror(error.errno)}. Make room or allow writing, then run "
            f"the same command again: what is finished stays"
        ) from None
