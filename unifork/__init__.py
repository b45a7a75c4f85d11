"""UniFork: training unified image understanding and generation models, from images to scores."""

import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unifork.library import Model

__version__ = "0.1.0"

# Must be set before torch is loaded. By default OpenMP threads spin while they wait for each other;
# with any other load on the machine a step of the small models took 60 times longer (measured,
# two threads on two busy cores: 5.2 s instead of 0.09 s). Asleep at once, they cost a third of the speed of an idle
# machine: they spin for some microseconds (docs/training.md, the demo's recipe, has what that gains and costs).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(directory: Path | str, device: str | None = None, dtype: str = "float32") -> "Model":
    """A model directory, ready to draw and to answer; see `unifork.library.Model`.

    device: `cpu`, `cuda`, ...; None is a GPU where there is one. dtype: `float32` or `bfloat16`.
    """
    from unifork.library import Model  # noqa: PLC0415  torch is slow to import

    return Model.load(directory, device, dtype)


class _Register(MetaPathFinder, Loader):
    """Has `AutoModel` know the models of this project, without loading transformers before anybody asks for it."""

    after = "transformers.models.auto.modeling_auto"

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != self.after:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found and found.loader:
            self.loader, found.loader = found.loader, self
        return found

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("unifork.models.modeling")


if _Register.after in sys.modules:
    importlib.import_module("unifork.models.modeling")
else:
    sys.meta_path.insert(0, _Register())
