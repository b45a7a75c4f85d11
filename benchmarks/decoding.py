"""Generating images and answering questions: this tree against another commit's, and kernels of a position.

`python benchmarks/decoding.py --against COMMIT` checks the commit out beside this one, starts one process for each
tree, with the same model, prompts and seed, and lets them work in turns, one call at a time. Seconds are processor
time of the call alone; the ratio is taken pair by pair. Codes and ids of all calls must be the same. The model has
the proportions of the paper's (half of the layers twice, a head wider than the decoder, 16,384 codes, 24 x 24 x 4) at
a seventh of its width; the image head draws with guidance 4, top-k 900 and top-p 0.96. Answers are of the model of
`training_step.py --size small`: 8 questions of 12 to 28 tokens about each of two images, 6 new tokens.

Without `--against` only the kernels are printed: operations that are no views, of one position of an image, in every
plan, counted on this tree.

Shape suffixes: N image positions, D code depth.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import interval, machine, ratio, table
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import DEPTH, SIZES, Size, make_model

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Document
from unifork.config import HeadConfig, Sampling
from unifork.models.generation import answer_texts, generate_images
from unifork.models.modeling import UniForkModel

ROOT = Path(__file__).parent.parent
HEAD = HeadConfig(layers=6, heads=4, head_dim=128)
IMAGES = Size(128, 24, 2, 1, 704, 7168, 16_384, 1024, 24, HEAD, 0)
PLANS = ["shared*rest", "shared*2 task*rest norm:task", "modality*rest norm:modality", "(shared modality_mlp)*rest",
         "modality_isolated*1 shared*rest modality_isolated*1", "task_mlp*rest norm:task"]  # fmt: skip
NEW_TOKENS = 6


def noisy(model: UniForkModel) -> UniForkModel:
    """The model with weights that spread its logits, as training does; fresh ones make all codes alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 0.1
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))
    model.set_attn_implementation("sdpa")
    return model.eval()


def questions(size: Size, count: int) -> list[Document]:
    """`count` questions about each of two images, after a template of 4 tokens and the image."""
    rng = np.random.default_rng(0)
    N, documents = size.grid**2, []
    start = [TEXT] * 4 + [BEGIN_IMAGE] + [IMAGE] * N + [END_IMAGE]
    for _ in range(2):
        codes_ND = rng.integers(0, size.codes, (N, DEPTH))
        for _ in range(count):
            words = int(rng.integers(12, 29))
            kinds_T = np.array(start + [TEXT] * words)
            ids_T = np.zeros(len(kinds_T), np.int64)
            ids_T[-words:] = rng.integers(0, size.words, words)
            documents.append(Document("", "understanding", kinds_T, ids_T, np.zeros(len(kinds_T), bool), codes_ND))
    return documents


def work(grid: int, words: int) -> None:
    """Do what the lines of standard input name, one after the other; print seconds and results."""
    drawing, rng = noisy(make_model(replace(IMAGES, grid=grid), "cpu")), np.random.default_rng(1)
    prompts = [rng.integers(0, IMAGES.words, words + rng.integers(33)).tolist() for _ in range(65)]
    answering, documents = noisy(make_model(SIZES["small"], "cpu")), questions(SIZES["small"], 8)
    ways: dict[str, Callable[[], Any]] = {
        "answers": lambda: answer_texts(answering, documents, NEW_TOKENS, -1),
        "answers, one at a time": lambda: [answer_texts(answering, [doc], NEW_TOKENS, -1)[0] for doc in documents],
    }
    for line in sys.stdin:
        name = line.strip()
        if name not in ways:
            way, _, batch = name.rpartition(" ")
            sampling = Sampling(seed=5, top_k=1 if way == "greedy images" else 900)
            ways[name] = lambda b=int(batch), s=sampling: generate_images(drawing, prompts[:b], prompts[64], s).tolist()
        started = time.process_time()
        found = ways[name]()
        print(json.dumps([time.process_time() - started, found]), flush=True)


class Tree:
    """A process that works with the library of one tree."""

    def __init__(self, root: Path, *options: str) -> None:
        command = [sys.executable, __file__, "--work", *options]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )

    def __call__(self, name: str) -> tuple[float, Any]:
        """Processor seconds of a piece of work, and what came out."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        seconds, found = json.loads(self.process.stdout.readline())
        return seconds, found


def compare(commit: str, options: list[str], names: list[str], pairs: int) -> list[list[object]]:
    """One line for each piece of work: seconds of both trees, their ratio, whether all results are equal."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), commit], check=True, capture_output=True)
        trees = [Tree(other, *options), Tree(ROOT, *options)]
        try:
            lines = []
            for name in names:
                seconds: list[list[float]] = [[], []]
                results = [trees[which](name)[1] for which in range(2)]  # also warms up
                for pair in range(pairs):
                    for which in (0, 1) if pair % 2 == 0 else (1, 0):
                        spent, found = trees[which](name)
                        seconds[which].append(spent)
                        results.append(found)
                equal = all(found == results[0] for found in results)
                lines.append([name, *map(interval, seconds), ratio(*seconds), "yes" if equal else "NO"])
                print("|", *lines[-1], flush=True, file=sys.stderr)
            return lines
        finally:
            for tree in trees:
                tree.process.kill()
            subprocess.run([*git, "remove", "--force", str(other)], check=True)


class Kernels(TorchDispatchMode):
    """Counts operations that compute; a view starts no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def kernels(plan: str) -> int:
    """Kernels of one position of an image, by the difference of two lengths; sizes do not matter."""
    totals = []
    for grid in (2, 3):
        model = make_model(replace(IMAGES, hidden=32, mlp=64, words=64, codes=2048, channels=8, grid=grid), "cpu", plan)
        model.set_attn_implementation("sdpa")
        with Kernels() as counted:
            generate_images(model.eval(), [[1, 2, 3]], [4, 5], Sampling())
        totals.append(counted.counts.total())
    return (totals[1] - totals[0]) // 5


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="the tree to compare with")
    parser.add_argument("--grid", type=int, default=24, help="rows and columns of positions of a generated image")
    parser.add_argument("--words", type=int, default=12, help="tokens of the shortest prompt; the longest has 32 more")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=["images 1", "images 16", "answers", "answers, one at a time"])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.work:
        work(given.grid, given.words)
        return
    what = f"{given.grid}x{given.grid} positions; prompts of {given.words} to {given.words + 32} tokens"
    print(f"{machine('cpu')}; float32; {what}; {given.pairs} pairs\n")
    options = ["--grid", str(given.grid), "--words", str(given.words)]
    if given.against:
        head = ["work", f"CPU seconds at {given.against}", "here", "times faster", "codes or ids equal"]
        print(table(head, compare(given.against, options, given.ways, given.pairs)), "\n")
    print(table(["plan", "kernels of a position"], [[plan, kernels(plan)] for plan in PLANS]))


if __name__ == "__main__":
    main()
