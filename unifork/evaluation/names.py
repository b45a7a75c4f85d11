"""Names that the programs of evaluation share: keys and files of what they leave to each other, and a model's own."""

from hashlib import sha256
from pathlib import Path

from unifork.config import read_yaml
from unifork.shards.manifest import file_sha256

REGISTRIES: dict[str, dict[str, str]] = read_yaml(Path(__file__).with_name("registries.yaml"))
"""What cards may name, and `MODULE:OBJECT` of each."""
ABSENT = "not_here"
"""Key of the manifest of a benchmark whose archive is not there: what to put where."""
MADE_ON = b"unifork.made_on"
"""Schema metadata of a shard of answers: JSON with the device and the torch that they come from."""
SAMPLES = "samples.jsonl"
"""File of a benchmark of text: a line for each question."""
METRICS = ("acc", "acc_norm")
"""Of text, the likeliest answer is right: by its log-likelihood, and by that divided by its length in letters."""


def identity(model: Path) -> str:
    """The name of a model: a hash of its weights, configuration and tokenizers."""
    files = sorted(path for path in model.rglob("*") if path.suffix in (".json", ".safetensors", ".txt"))
    digests = [f"{file.relative_to(model)} {file_sha256(file)}" for file in files if "training" not in file.parts]
    return sha256("\n".join(digests).encode()).hexdigest()[:16]
