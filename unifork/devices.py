"""Where networks run: names of devices and number types that people write -> those of torch."""

from typing import TYPE_CHECKING

from unifork.errors import ConfigError, unknown

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

    if name not in DTYPES:
        raise unknown("number type", name, DTYPES, place)
    dtype: torch.dtype = getattr(torch, name)
    return dtype
