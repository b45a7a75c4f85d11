"""Peak memory and time of the chunked loss against whole logits, forward and backward.

`python benchmarks/loss_memory.py` prints a table; each row runs in a process of its own, so that
its peak is its own. On a GPU: `--device cuda --dtype bfloat16`. Memory is what is needed beyond the
classifier, the hidden states and one gradient of each.
"""

import argparse
import json
import resource

import torch
import torch.nn.functional as F
from timing import clock, in_a_new_process, interval, machine, table

from unifork.models import losses

CASES = {
    "text, 151,936 words x 896, 1,024 targets": (1024, 151_936, 896),
    "image, 16,384 codes x 896, 2 images of 576 x 4": (4608, 16_384, 896),
    "text of the demo, 800 words x 128, 512 targets": (512, 800, 128),
    "image of the demo, 256 codes x 128, 8 images of 36 x 4": (1152, 256, 128),
}


def naive(hidden_RH, weight_VH, target_R):
    """The logits whole, in float32."""
    return F.cross_entropy(F.linear(hidden_RH, weight_VH).float(), target_R, reduction="sum")


def chunked(hidden_RH, weight_VH, target_R):
    """What the model does."""
    return losses.linear_cross_entropy(hidden_RH, weight_VH, None, target_R).sum()


WAYS = {"naive": naive, "chunked": chunked}


def peak_bytes(device: str) -> int:
    """The most memory this process has ever had in use."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def measure(case: str, way: str, device: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Extra peak memory in bytes and median seconds of forward and backward."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    R, V, H = CASES[case]
    hidden_RH = torch.randn(R, H, device=device, dtype=dtype, requires_grad=True)
    weight_VH = torch.randn(V, H, device=device, dtype=dtype).mul_(H**-0.5).requires_grad_()
    target_R = torch.randint(0, V, (R,), device=device)
    hidden_RH.grad, weight_VH.grad = torch.ones_like(hidden_RH), torch.ones_like(weight_VH)
    before = peak_bytes(device)
    hidden_RH.grad = weight_VH.grad = None
    seconds = []
    inner = max(1, 2**26 // (R * V))
    for _ in range(repeats):
        started = clock(device)
        for _ in range(inner):
            WAYS[way](hidden_RH, weight_VH, target_R).backward()
            hidden_RH.grad = weight_VH.grad = None
        seconds.append((clock(device) - started) / inner)
    return {"bytes": peak_bytes(device) - before, "seconds": interval(seconds).median}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", nargs=2, metavar=("CASE", "WAY"), help="measure one case here and print JSON")
    given = parser.parse_args()
    options = ["--device", given.device, "--dtype", given.dtype, "--repeats", str(given.repeats)]
    if given.case:
        print(json.dumps(measure(*given.case, given.device, getattr(torch, given.dtype), given.repeats)))
        return
    print(f"{machine(given.device)}; {given.dtype}\n")
    rows = []
    for case in CASES:
        found = {way: json.loads(in_a_new_process(__file__, *options, "--case", case, way)) for way in WAYS}
        plain, ours = found["naive"], found["chunked"]
        memory = [f"{result['bytes'] / 2**20:,.0f}" for result in (plain, ours)]
        times = [f"{result['seconds'] * 1e3:,.1f}" for result in (plain, ours)]
        rows.append([case, *memory, *times, f"{plain['seconds'] / ours['seconds']:.2f}"])
    print(table(["loss", "naive MiB", "chunked MiB", "naive ms", "chunked ms", "times faster"], rows))


if __name__ == "__main__":
    main()
