"""One thin program per stage of `dvc.yaml`: read the configuration, call the library, say what was done."""

import sys
from importlib.util import find_spec

_missing = [name for name in ("numpy", "pyarrow", "pydantic", "torch", "yaml") if find_spec(name) is None]
if _missing:
    where = f"{sys.executable}: this Python lacks {', '.join(_missing)}"
    print(f"error: {where}; activate .venv (or: make .venv/.installed)", file=sys.stderr)
    sys.exit(2)
