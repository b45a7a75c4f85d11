"""What a training step really reads, as people read it: documents, supervised tokens, shares of the loss, routes.

In: an experiment's folder with its codes and tokenizers; no model is needed. Out: an `Inspection` of
one packed batch, and its text. The batch is the first one of the first worker, made by the loader
that training uses. In the text, `[[ ]]` stands around learned tokens, `[image ...]` for an image and
`<|...|>` for a control token. The same letters in what people wrote are escaped, and so is everything
that does not print: no text can look like a mark, or command the terminal.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Literal

from rich.text import Text

from unifork.batch import TEXT, Batch, Document
from unifork.config import Cluster, Experiment, Track, cluster_file, load
from unifork.documents.loader import StepPlan, TrackLoader
from unifork.documents.mixture import CodesIdentity, Quarantine
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError, unknown
from unifork.image_tokenizer.architecture import describe
from unifork.layout import Layout
from unifork.models.decoder import batch_routes
from unifork.models.layer_plan import BRANCHES, KINDS, LayerPlan, RouteBy
from unifork.shards.manifest import MANIFEST
from unifork.vocabulary import TASKS, VIEW_OF_TASK, Task

StretchKind = Literal["text", "control", "image"]
STYLES: dict[StretchKind, str] = {"text": "", "control": "cyan", "image": "magenta"}
SUPERVISED = "bold green"


@dataclass(frozen=True)
class Stretch:
    """Tokens of one kind that follow each other, all supervised or none."""

    kind: StretchKind
    text: str
    """As it is, not escaped; for an image, what it is made of."""
    supervised: bool


@dataclass(frozen=True)
class Shown:
    """One document of the batch."""

    document: Document
    dataset: str
    template: str
    """Name of the template, or that the prompt is dropped."""
    share: float
    """Part of the targets of its task in this step: its part of the loss, if all were equally hard."""
    stretches: list[Stretch]


@dataclass(frozen=True)
class Inspection:
    """One packed batch of one track."""

    title: str
    facts: list[str]
    """Size and fill, what it holds of each task, where its tokens go in each kind of layer."""
    documents: list[Shown]
    hidden: int
    """Documents of the batch that are not shown."""
    quarantined: dict[str, int]


def inspect(root: Path, variant: str, stage: str, step: int, documents: int) -> Iterator[Inspection]:
    """One batch of each track of a stage, at a step of that track.

    Raises ConfigError for a name or step that the experiment does not have, and DataError for what
    is not there yet, with the command that makes it.
    """
    layout = Layout(root)
    params = load(Experiment, _there(layout.params, "unifork use NAME"))
    if variant not in params.variants:
        raise unknown("variant", variant, params.variants, "params.yaml: variants")
    architecture = params.variants[variant]
    if stage not in architecture.stages:
        raise unknown("stage", stage, architecture.stages, f"params.yaml: variants.{variant}.stages")
    chosen, resources = params.stages[stage], load(Cluster, root / cluster_file()).for_stage(stage)
    workers = max(resources.workers, 1)
    layers = LayerPlan.parse(architecture.plan, architecture.backbone.get("num_hidden_layers"))
    tokenizer = TextTokenizer(_there(layout.text_tokenizer, "dvc repro text_tokenizer"))
    images = describe(_there(layout.image_tokenizer, "dvc repro image_tokenizer"))
    shape = images.architecture
    identity = CodesIdentity(shape.grid**2, shape.depth, images.codebook_id, images.encoder_id)
    for name, track in chosen.tracks.items():
        if step >= track.steps:
            raise ConfigError(f"--step {step}: track {name} of {stage} has the steps 0 to {track.steps - 1}")
        for entry in track.mixture:
            codes = layout.codes / entry.dataset / VIEW_OF_TASK[entry.task]
            _there(codes / MANIFEST, f"dvc repro encode@{entry.dataset}")
        quarantine = Quarantine()
        loader = TrackLoader(
            name, track, layout, tokenizer, identity,
            seed=chosen.seed, context=chosen.context, row_tokens=resources.row_tokens,
            rows_per_microbatch=resources.rows_per_microbatch, quarantine=quarantine,
        )  # fmt: skip
        plan = loader.plan(step, workers)
        batch = next(loader.batches(plan, 0))
        made = {number: loader.document(plan, number) for row in plan.microbatches[0][0] for number in row}
        shown = [_shown(made[number], number, plan, track, tokenizer) for number in _some_of_each_task(made, documents)]
        yield Inspection(
            title=f"{variant}, stage {stage}, track {name}, step {step} of {track.steps}: "
            f"batch 1 of {len(plan.microbatches[0])} of worker 1 of {workers}",
            facts=[*_contents(batch, list(made.values()), plan), *_routes(batch, layers)],
            documents=shown,
            hidden=len(made) - len(shown),
            quarantined=quarantine.counts(),
        )


def _there(path: Path, command: str) -> Path:
    if not path.exists():
        raise DataError(f"{path}: not there yet; `{command}` makes it")
    return path


def _some_of_each_task(made: dict[int, Document], limit: int) -> list[int]:
    """Documents of every task in turn, at most `limit`, in the order of the batch."""
    turns = zip_longest(*([number for number, one in made.items() if one.task == task] for task in TASKS))
    chosen = [number for number in chain.from_iterable(turns) if number is not None][:limit]
    return [number for number in made if number in chosen]


def _targets(document: Document) -> int:
    """Supervised text tokens, or image positions of a document of generation."""
    is_generated = document.task == "generation"
    return len(document.codes_ND[: document.supervised_positions]) if is_generated else int(document.learned_T.sum())


def _step_targets(plan: StepPlan, task: Task) -> int:
    return plan.image_targets if task == "generation" else plan.text_targets


def _shown(document: Document, number: int, plan: StepPlan, track: Track, tokenizer: TextTokenizer) -> Shown:
    entry = track.mixture[plan.slots[number].part]
    template = entry.template + ", prompt dropped" * bool(plan.dropped[number])
    share = _targets(document) / _step_targets(plan, document.task)
    return Shown(document, entry.dataset, template, share, list(_stretches(document, tokenizer)))


def _stretches(document: Document, tokenizer: TextTokenizer) -> Iterator[Stretch]:
    def kind_of(token: int) -> tuple[StretchKind, bool]:
        if document.kinds_T[token] != TEXT:
            return "image", document.task == "generation"
        named = tokenizer.control_token(int(document.text_ids_T[token]))
        return "control" if named else "text", bool(document.learned_T[token])

    for (kind, supervised), run in groupby(range(len(document)), key=kind_of):
        ids = document.text_ids_T[list(run)].tolist()
        if kind == "image":
            positions, depth = document.codes_ND.shape
            part = f", the first {_targets(document)} learned" if supervised and _targets(document) < positions else ""
            yield Stretch(kind, f"image {positions}x{depth} codes{part}", supervised)
        elif kind == "control":
            yield Stretch(kind, "".join(tokenizer.control_token(one) or "" for one in ids), supervised)
        else:
            yield Stretch(kind, tokenizer.decode(ids), supervised)


def _contents(batch: Batch, documents: list[Document], plan: StepPlan) -> Iterator[str]:
    rows, row_tokens = batch.kinds_BT.shape
    yield f"{rows} x {row_tokens} tokens, {sum(map(len, documents)) / (rows * row_tokens):.1%} filled"
    for task in TASKS:
        targets = [_targets(document) for document in documents if document.task == task]
        whole = _step_targets(plan, task)
        part = f"{sum(targets) / whole:.1%}" if whole else "nothing"
        unit = "image positions" if task == "generation" else "text tokens"
        counted = f"{sum(targets)} of the step's {whole} learned {unit}"
        yield f"{task}: {len(targets)} documents, {counted}, {part} of its loss"


def _routes(batch: Batch, plan: LayerPlan) -> Iterator[str]:
    """Where the tokens of the batch go in every kind of layer, and in the norm after the last one."""
    by: dict[str, RouteBy] = {f"{times} x {name}": KINDS[name].route for name, times in Counter(plan.layers).items()}
    by["final norm"] = plan.norm_route
    routes = batch_routes(batch, frozenset(by.values()))
    for name, route in by.items():
        counts = zip(BRANCHES[route], routes[route].counts, strict=True)
        gathered = ", gathered" * (routes[route].order_X is not None)
        yield f"{name}: {', '.join(f'{b} {count}' for b, count in counts)} tokens, padding included{gathered}"


# ---------------------------------------------------------------------------------------- as text


def rendered(inspection: Inspection, marks: bool) -> Text:
    """An inspection as people read it: in colours, and with `marks` around learned tokens too."""
    text = Text()
    text.append(inspection.title + "\n", "bold")
    for fact in inspection.facts:
        text.append(fact + "\n")
    for reason, count in inspection.quarantined.items():
        text.append(f"quarantined: {count} x {visible(reason)}\n", "yellow")
    for shown in inspection.documents:
        document, targets = shown.document, _targets(shown.document)
        text.append(f"\n{visible(shown.dataset)} {visible(document.key)}", "bold")
        text.append(
            f", {document.task} ({shown.template}), {len(document)} tokens, {targets} learned, "
            f"{shown.share:.1%} of the loss of {document.task}\n"
        )
        for supervised, run in groupby(shown.stretches, key=lambda stretch: stretch.supervised):
            inside = Text()
            for stretch in run:
                inside.append(_written(stretch), SUPERVISED if supervised else STYLES[stretch.kind])
            text.append_text(Text("[[") + inside + Text("]]") if supervised and marks else inside)
        text.append("\n")
    if inspection.hidden:
        text.append(f"\n... and {inspection.hidden} more documents in this batch\n")
    return text


def _written(stretch: Stretch) -> str:
    if stretch.kind == "text":
        return visible(stretch.text)
    return f"[{stretch.text}]" if stretch.kind == "image" else stretch.text


def visible(text: str) -> str:
    r"""Text in one line of printing characters: `\`, `[`, `]` and `<` get a `\` in front, which marks never have;
    what does not print is written as Python writes it (`\n`, `\x1b`, `\u202e`).
    """
    return "".join(map(_visible, text))


def _visible(letter: str) -> str:
    if letter in "\\[]<":
        return f"\\{letter}"
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()
