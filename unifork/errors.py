"""The errors a user can meet. Each message names the value, the place and what is allowed."""

import errno
import os
import re
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, TypeVar

Found = TypeVar("Found")


class UniForkError(Exception):
    """A mistake in the input, the configuration or the state on disk; never a bug of the program."""


class ConfigError(UniForkError):
    """A configuration, card, plan or command line that cannot be used."""


class DataError(UniForkError):
    """A shard, manifest or image that is missing, damaged or of another kind than promised."""


class Rejected(DataError):
    """An entry, image or text that is of no use: `reason` is one word to count it by, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What an operating system says of a full or read-only disk, and of nothing that is only read."""
UNWRITABLE = (*FULL, errno.EACCES, errno.EPERM)
"""And of a forbidden one."""
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)
"""And of a file where a folder should be."""


@contextmanager
def writing(path: os.PathLike[str] | str, refusals: Sequence[int] = UNWRITABLE + IN_THE_WAY) -> Iterator[None]:
    """Raise MachineError, which names the place and the way on, where a disk takes nothing more.

    refusals: `errno` by which it says so.
    """
    try:
        yield
    except UniForkError:
        raise
    except Exception as error:
        number = (error.errno if isinstance(error, OSError) else None) or 0
        if not number and (written := re.search(r"(?:\[Errno |os error )(\d+)", str(error))):  # by a library
            number = int(written[1])
        if number not in refusals:
            raise
        raise MachineError(
            f"{os.fspath(path)}: cannot be written: {os.strerror(number)}. Make room or allow writing, then run "
            f"the same command again: what is finished stays"
        ) from None


# ------------------------------------------------------------------------------ what a broken input costs

DEVICE_ERRORS = (
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS,
)  # fmt: skip
"""What an operating system says where a disk or mount fails or nothing is left, whatever file is read."""


def cause(error: Exception) -> str:
    """What is wrong with an input, from what reading it raised.

    Raises ConfigError, MachineError and ChangedFile again: no input is to blame, and dropping rows would hide them.
    """
    if isinstance(error, ConfigError | MachineError | ChangedFile):
        raise error
    if isinstance(error, OSError) and error.errno in DEVICE_ERRORS:
        raise MachineError(f"{error}: it cannot be read. Mend the disk or mount, then run the command again") from error
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def rejected(error: Exception, reason: str = "unexpected") -> Rejected:
    """What reading something raised, as what its row is counted by: `reason` where it has none of its own."""
    if isinstance(error, Rejected):
        return Rejected(error.reason, str(error))  # without its traceback, which holds files and bytes
    if isinstance(error, UnicodeError):
        return Rejected("broken_text", f"not UTF-8, or half a surrogate pair: {cause(error)}")
    return Rejected(reason, cause(error))


def tried(read: Callable[..., Found], *arguments: Any, reason: str = "unexpected") -> Found | Rejected:
    """What `read` returns, or why that is of no use. Raises what `cause` does."""
    try:
        return read(*arguments)
    except Exception as error:
        return rejected(error, reason)
