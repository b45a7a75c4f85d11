"""Which files of large data sets DVC does not look at: all but the manifests, which name the hash of every shard.

In: an experiment. Out: a part of `.dvcignore` that `unifork use` writes. A set that is tracked `whole` travels with
push and pull; of one tracked by `manifest` the shards lie where the job wrote them, once, and are never hashed or
copied by DVC. Every program checks the shards that it reads, since DVC cannot miss one there.
"""

from pathlib import Path

from unifork.config import Experiment
from unifork.layout import Layout
from unifork.shards.manifest import MANIFEST, write_atomically

BEGIN, END = "# --- written by `unifork use`: sets tracked by their manifests", "# --- end of what it writes"


def write_ignore_rules(experiment: Experiment, path: Path) -> None:
    """Replace the written part of `.dvcignore` by that of an experiment; the rest of the file stays."""
    text = path.read_text() if path.exists() else ""
    before, _, rest = text.partition(f"{BEGIN}\n")
    if before and not before.endswith("\n"):
        before += "\n"
    rules, layout = list[str](), Layout()
    for name, use in experiment.datasets.items():
        if use.track == "manifest":
            places = [getattr(layout, stage)(name) for stage in ("raw", "measured", "signatures", "filtered")]
            places += [layout.prepared / key for key, chosen in experiment.prepared.items() if chosen.dataset == name]
            for place in (*places, layout.codes / name / "*"):
                rules += [f"/{place.as_posix()}/*", f"!/{place.as_posix()}/{MANIFEST}"]
    written = "".join(f"{line}\n" for line in (BEGIN, *rules, END)) if rules else ""
    changed = before + written + (rest.partition(f"{END}\n")[2] if END in rest else rest)
    if changed != text:
        write_atomically(path, lambda temporary: temporary.write_text(changed))
