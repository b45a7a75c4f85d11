"""`unifork generate`, `describe` and `serve`: what a model directory draws and answers."""

import glob
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from unifork.errors import ConfigError, DataError

ModelDirectory = Annotated[Path, typer.Option(help="model directory, for example models/unifork-s3")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the default is a GPU where there is one")]
Dtype = Annotated[str, typer.Option(help="number type of the model: float32 or bfloat16")]
IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
"""What is taken of a folder."""
GRID_GAP = 2


def generate(
    model: ModelDirectory,
    out: Annotated[Path, typer.Option(help="folder for the images")],
    prompt: Annotated[list[str] | None, typer.Option(help="what the images show; may be given several times")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with a prompt in each line")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="images for each prompt")] = 1,
    grid: Annotated[Path | None, typer.Option(help="one image of them all, a row for each prompt")] = None,
    seed: Annotated[int, typer.Option(help="seed of the draws")] = 0,
    cfg: Annotated[float | None, typer.Option(help="classifier-free guidance scale, 1 switches it off")] = None,
    temperature: Annotated[float | None, typer.Option(help="divides the guided logits")] = None,
    top_k: Annotated[int | None, typer.Option(help="codes kept before top-p; 1 takes the likeliest")] = None,
    top_p: Annotated[float | None, typer.Option(help="probability mass kept")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="what the images do not show")] = None,
    template: Annotated[str, typer.Option(help="prompt template of the model's last stage")] = "generate",
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Draw images for prompts: OUT/0000.png, 0001.png, ... and OUT/images.jsonl, which says what each shows.

    What is not given is as the model's last stage draws its samples.
    """
    from PIL import Image

    from unifork.library import Model

    texts = [*(prompt or []), *(lines(prompts) if prompts else [])]
    if not texts:
        raise ConfigError("nothing to draw: give --prompt TEXT, as often as you like, or --prompts FILE")
    given: dict[str, Any] = {"guidance": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    given |= {"negative_prompt": negative_prompt, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    every = [text for text in texts for _ in range(n)]
    images = Model.load(model, device, dtype).generate_images(every, template=template, **sampling)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{number:04d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
        print(path)
    rows = [{"file": p.name, "prompt": text, **sampling} for p, text in zip(paths, every, strict=True)]
    (out / "images.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if grid:
        side = images[0].width + GRID_GAP
        sheet = Image.new("RGB", (n * side - GRID_GAP, len(texts) * side - GRID_GAP), "white")
        for number, image in enumerate(images):
            sheet.paste(image, (number % n * side, number // n * side))
        grid.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(grid)
        print(grid)


def describe(
    model: ModelDirectory,
    image: Annotated[list[str], typer.Option(help="image file, folder or pattern; may be given several times")],
    question: Annotated[list[str], typer.Option(help="what to ask about each; may be given several times")],
    jsonl: Annotated[Path | None, typer.Option(help="file to write, an object in each line")] = None,
    template: Annotated[str, typer.Option(help="prompt template of the model's last stage")] = "answer",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 128,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Answer questions about images."""
    from unifork.library import Model

    files = [path for words in image for path in _files(words)]
    pairs = [(path, text) for path in files for text in question]
    answers = Model.load(model, device, dtype).answer_questions(
        [path for path, _ in pairs], [text for _, text in pairs], template=template, max_new_tokens=max_new_tokens
    )
    rows = [
        {"image": str(path), "question": text, "answer": answer}
        for (path, text), answer in zip(pairs, answers, strict=True)
    ]
    if jsonl:
        jsonl.parent.mkdir(parents=True, exist_ok=True)
        jsonl.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} answers -> {jsonl}")
        return
    for row in rows:
        place = f"{row['image']}: " * (len(files) > 1) + f"{row['question']} " * (len(question) > 1)
        print(place + (row["answer"] or "(the answer is empty)"))


def serve(
    model: ModelDirectory,
    host: Annotated[str, typer.Option(help="where to listen; but on this machine, a token is needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8100,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Show a page on which the model draws, answers and chats."""
    from unifork.library import Model
    from unifork.serving import run

    run(Model.load(model, device, dtype), host, port)


def lines(path: Path) -> list[str]:
    """The lines of a file that hold something. Raises DataError where there is no file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _files(words: str) -> list[Path]:
    """The image files of a path or pattern, in order. Raises DataError where there are none."""
    path = Path(words)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_FILES)
    else:
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(words, recursive=True))]
    if not found:
        endings = f" ({', '.join(sorted(IMAGE_FILES))})" if path.is_dir() else ""
        raise DataError(f"{words}: {f'no image files in this folder{endings}' if path.is_dir() else 'no such file'}")
    return found
