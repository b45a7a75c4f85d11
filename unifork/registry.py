"""Tables of things that configurations name: kinds of source, benchmarks, ...

In: a name, either one of the table or `MODULE:OBJECT`, which is how anybody's code takes part without touching the
library. Out: the object. Modules are imported when they are asked for, so that one kind never waits for another's
libraries, and a worker process finds what its driver found.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Generic, TypeVar

from unifork.errors import ConfigError, refusing, unknown

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Names and the objects they stand for."""

    def __init__(self, what: str, kind: type[Entry], addresses: Mapping[str, str]) -> None:
        """what: the word for one entry in messages; kind: its type; addresses: name -> `MODULE:OBJECT`."""
        self.what, self.kind, self.addresses = what, kind, dict(addresses)

    def find(self, name: str, place: str) -> Entry:
        """The object of a name. Raises ConfigError naming `place` and the known names."""
        address = self.addresses.get(name, name)
        module, separator, attribute = address.partition(":")
        if not separator:
            raise ConfigError(f"{unknown(self.what, name, self.addresses, place)} Or MODULE:OBJECT of your own code.")
        with refusing(ConfigError, f"{place}: {self.what} {name!r}", ImportError, AttributeError):
            found = getattr(import_module(module), attribute)
        if not isinstance(found, self.kind):
            raise ConfigError(f"{place}: {self.what} {name!r} is a {type(found).__name__}, not a {self.kind.__name__}")
        return found
