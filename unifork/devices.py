"""Where networks run: names of devices and number types that people write -> those of torch.

A GPU may also be trusted to replay captured steps: `unifork doctor` has compared them there with the same torch.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from unifork.errors import ConfigError, one_of

if TYPE_CHECKING:  # `unifork --help` must not wait for torch
    import torch

DTYPES = ("float32", "bfloat16")


def chosen_device(name: str | None, place: str) -> "torch.device":
    """The device of a name; None is a GPU where there is one. Raises ConfigError for one that is not here."""
    import torch  # noqa: PLC0415

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{place} {name!r}: no name of a device; allowed are cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{place} {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def chosen_dtype(name: str, place: str) -> "torch.dtype":
    """The number type of a name. Raises ConfigError."""
    import torch  # noqa: PLC0415

    dtype: torch.dtype = getattr(torch, one_of("number type", name, DTYPES, place))
    return dtype


def trust_capture(device: "torch.device", trusted: bool) -> None:
    """Remember, for this user, whether captured steps gave the numbers of the same steps without capture."""
    path = _captures()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_read(path), _described(device): trusted}, indent=1))


def is_capture_trusted(device: "torch.device") -> bool:
    """Whether `unifork doctor` has found captured steps right on such a GPU with this torch."""
    return device.type == "cuda" and _read(_captures()).get(_described(device)) is True


def _captures() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unifork" / "captures.json"


def _read(path: Path) -> dict[str, bool]:
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _described(device: "torch.device") -> str:
    import torch  # noqa: PLC0415

    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
