"""`unifork tokenizer`: official tokenizers as ours, images to codes, codes to images."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unifork.errors import DataError, IdentityError, refusing

if TYPE_CHECKING:
    from unifork.image_tokenizer.code_encoder import CodeEncoder

app = typer.Typer(no_args_is_help=True, help=__doc__)

ImageSize = Annotated[int | None, typer.Option(min=1, help="side in pixels, 384 in the paper; default: the tower's")]
VisionTower = Annotated[str | None, typer.Option(help="folder of the tower's configuration, if none is named")]
AllowPickle = Annotated[bool, typer.Option(help="read .bin and .pt files, which safetensors replace")]
TokenizerDirectory = Annotated[Path, typer.Option(help="tokenizer directory, for example tokenizers/image")]
BATCH_IMAGES = 8


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="a vision_tower folder or a UniFork checkpoint, local or OWNER/NAME")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    image_size: ImageSize = None,
    vision_tower: VisionTower = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write an official tokenizer as a tokenizer directory of this project."""
    from unifork.image_tokenizer.conversion import read_official

    tokenizer = read_official(source, image_size, vision_tower, allow_pickle)
    tokenizer.save(out)
    shape = tokenizer.architecture
    print(
        f"{out}: images of {shape.image_size} pixels, {shape.grid} x {shape.grid} positions with {shape.depth} "
        f"codes of {shape.codebook_size}; codebook_id {tokenizer.codebook_id}, encoder_id {tokenizer.encoder_id}"
    )


@app.command()
def encode(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    tokenizer: TokenizerDirectory,
    out: Annotated[Path, typer.Option(help="file to write, .npz")],
    view: Annotated[str, typer.Option(help="crop (generation), pad (understanding) or pad-first")] = "crop",
) -> None:
    """Write the codes of images: arrays `codes` (image, row, column, depth), `names`, and what made them."""
    import numpy as np

    from unifork.shards.manifest import write_atomically

    check_files(images)
    coder = code_encoder(tokenizer, view)
    shape = coder.tokenizer.architecture
    codes = coder.encode_images(images)
    facts: dict[str, Any] = {
        "codes": codes.reshape(len(codes), shape.grid, shape.grid, shape.depth),
        "names": [path.name for path in images],
        "view": view,
        "codebook_id": coder.tokenizer.codebook_id,
        "encoder_id": coder.tokenizer.encoder_id,
    }
    np.savez_compressed(data := BytesIO(), **facts)
    write_atomically(out, lambda temporary: temporary.write_bytes(data.getvalue()))
    print(f"{out}: codes {facts['codes'].shape}, view {view}")


@app.command()
def decode(
    codes: Annotated[Path, typer.Argument(help="file of `unifork tokenizer encode`")],
    tokenizer: TokenizerDirectory,
    out: Annotated[Path, typer.Option(help="folder for the images")],
) -> None:
    """Draw the images that codes stand for: OUT/0000-NAME.png, ..."""
    coder = code_encoder(tokenizer, "crop")
    stored = _read(codes)
    if str(stored["codebook_id"]) != coder.tokenizer.codebook_id:
        raise IdentityError(
            f"{codes}: codes of the codebook {stored['codebook_id']}; {tokenizer} has {coder.tokenizer.codebook_id}"
        )
    array = stored["codes"]
    decoded = coder.decode_codes(array.reshape(len(array), -1))
    out.mkdir(parents=True, exist_ok=True)
    for number, (image, name) in enumerate(zip(decoded, stored["names"], strict=True)):
        path = out / f"{number:04d}-{Path(str(name)).stem}.png"
        image.save(path)
        print(path)


def _read(path: Path) -> dict[str, Any]:
    import zipfile

    import numpy as np

    unreadable = (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile)
    with (
        refusing(DataError, f"{path}: no file of `unifork tokenizer encode`", *unreadable),
        np.load(path, allow_pickle=False) as file,
    ):
        return {name: file[name] for name in ("codes", "names", "codebook_id")}


def check_files(images: Iterable[Path]) -> None:
    """Raises DataError, before anything is loaded, for an image that is not there or is a folder."""
    for path in images:
        if not path.is_file():
            raise DataError(f"{path}: {'a folder, not an image' if path.is_dir() else 'no such file'}")


def code_encoder(directory: Path, view: str) -> "CodeEncoder":
    """The image tokenizer of a directory, as the commands use it."""
    from unifork.image_tokenizer.code_encoder import CodeEncoder
    from unifork.images import MATTE

    return CodeEncoder(directory, view, MATTE, BATCH_IMAGES)
