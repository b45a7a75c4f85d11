"""How long a checkpoint keeps training from going on, and how long it takes to reach the disk.

`python benchmarks/checkpoint.py --millions 100` prints, for one worker and a model of that many
parameters with AdamW's state: the copy that training waits for, the whole until `latest` names the
checkpoint, and the bytes on the disk. Wall time, because waiting is what counts.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from timing import interval, machine, table
from torch import nn

from unifork.training.checkpoint import Saver, State
from unifork.training.optimizer import MOMENTS
from unifork.training.strategies import Strategy

SIDE = 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=100, help="parameters")
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = nn.ParameterList([torch.randn(SIDE, SIDE, device=given.device) for _ in range(max(given.millions, 1))])
    names, optimizer = dict(model.named_parameters()), torch.optim.AdamW(model.parameters())
    for parameter in model:
        zeros = torch.zeros_like(parameter)
        optimizer.state[parameter] = {m: torch.tensor(0.0) if m == "step" else zeros.clone() for m in MOMENTS}
    strategy = Strategy()
    strategy.start({"track": (optimizer, names)})
    waits, wholes = [], []
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        run = Path(place)
        with Saver(run, set(names), "benchmark", keep=1, lead=True) as saver:
            for number in range(given.times + 1):
                started = time.perf_counter()
                saver.save(model, strategy, State({"track": number + 1}))
                waits.append(time.perf_counter() - started)
                saver.wait()
                wholes.append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    print(f"{machine(given.device)}; {SIDE**2 * len(model) / 1e6:.0f} M parameters, {size / 1e9:.2f} GB, "
          f"{given.times} checkpoints after one to warm up\n")  # fmt: skip
    print(table(["wall time of a checkpoint", "seconds"], [
        ["training waits", interval(waits[1:])],
        ["until it is `latest`", interval(wholes[1:])],
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
