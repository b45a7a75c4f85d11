"""What a training step really reads, as people read it: documents, learned tokens, shares of the loss, routes.

In: an experiment's folder with its codes and tokenizers; no model is needed. Out: an `Inspection` of
one packed batch, and its text. The batch is the first one of the first worker, made by the loader
that training uses. In the text, `[[ ]]` stands around learned tokens, `[image ...]` for a picture and
`<|...|>` for a control token. The same letters in what people wrote are escaped, and so is everything
that does not print: no text can look like a mark, or command the terminal.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
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
from unifork.models.decoder import Route, batch_routes
from unifork.models.layer_plan import BRANCHES, KINDS, LayerPlan, RouteBy
from unifork.shards.manifest import MANIFEST
from unifork.vocabulary import TASKS, VIEW_OF_TASK, Task

StretchKind = Literal["text", "control", "image"]
STYLES: dict[StretchKind, str] = {"text": "", "control": "cyan", "image": "magenta"}
LEARNED = "bold green"


@dataclass(frozen=True)
class Stretch:
    """Tokens of one kind that follow each other, all learned or none."""

    kind: StretchKind
    text: str
    """As it is, not escaped; for a picture, what it is made of."""
    learned: bool


@dataclass(frozen=True)
class Shown:
    """One document of the batch."""

    dataset: str
    key: str
    task: Task
    template: str
    """Name of the template, or that the prompt is dropped."""
    tokens: int
    targets: int
    """Learned text tokens, or image positions of a document of generation."""
    share: float
    """Part of the targets of its task in this step: its part of the loss, if all were equally hard."""
    stretches: list[Stretch]


@dataclass(frozen=True)
class TaskShare:
    """What the batch holds of one task; targets as in `Shown`, `step_targets` those of the whole step."""

    task: Task
    documents: int
    targets: int
    step_targets: int


@dataclass(frozen=True)
class Inspection:
    """One packed batch of one track."""

    title: str
    rows: int
    row_tokens: int
    fill: float
    """Part of the batch's tokens that belong to documents."""
    tasks: list[TaskShare]
    routes: list[tuple[str, str]]
    """(layers, tokens of each branch)"""
    documents: list[Shown]
    hidden: int
    """Documents of the batch that are not shown."""
    quarantined: dict[str, int]


def inspect(root: Path, variant: str, stage: str, step: int, documents: int) -> Iterator[Inspection]:
    """One batch of each track of a stage, at a step of that track.

    Raises ConfigError for a name or step that the experiment does not have, and DataError for what
    is not there yet, with the command that makes it.
    """
    params = load(Experiment, _there(root / "params.yaml", "unifork use NAME"))
    if variant not in params.variants:
        raise unknown("variant", variant, params.variants, "params.yaml: variants")
    if stage not in params.variants[variant].stages:
        raise unknown("stage", stage, params.variants[variant].stages, f"params.yaml: variants.{variant}.stages")
    chosen, resources = params.stages[stage], load(Cluster, root / cluster_file()).for_stage(stage)
    workers = max(resources.workers, 1)
    architecture = params.variants[variant]
    layers = LayerPlan.parse(architecture.plan, architecture.backbone.get("num_hidden_layers"))
    tokenizer = TextTokenizer(_there(root / "tokenizers" / "text", "dvc repro text_tokenizer"))
    identity = _identity(_there(root / "tokenizers" / "image", "dvc repro image_tokenizer"))
    layout = Layout(root)
    for name, track in chosen.tracks.items():
        if step >= track.steps:
            raise ConfigError(f"--step {step}: track {name} of {stage} has the steps 0 to {track.steps - 1}")
        for entry in track.mixture:
            _there(
                layout.codes / entry.dataset / VIEW_OF_TASK[entry.task] / MANIFEST, f"dvc repro encode@{entry.dataset}"
            )
        quarantine = Quarantine()
        loader = TrackLoader(
            name, track, layout, tokenizer, identity,
            seed=chosen.seed, context=chosen.context, row_tokens=resources.row_tokens,
            rows_per_microbatch=resources.rows_per_microbatch, quarantine=quarantine,
        )  # fmt: skip
        plan = loader.plan(step, workers)
        title = (
            f"{variant}, stage {stage}, track {name}, step {step} of {track.steps}: "
            f"batch 1 of {len(plan.microbatches[0])} of worker 1 of {workers}"
        )
        yield _inspection(title, loader, plan, track, layers, tokenizer, documents, quarantine)


def _inspection(
    title: str, loader: TrackLoader, plan: StepPlan, track: Track, layers: LayerPlan,
    tokenizer: TextTokenizer, limit: int, quarantine: Quarantine,
) -> Inspection:  # fmt: skip
    batch = next(loader.batches(plan, 0))
    made = {number: loader.document(plan, number) for row in plan.microbatches[0][0] for number in row}
    in_step = dict(zip(TASKS, (plan.text_targets, plan.image_targets), strict=True))
    shown = []
    for number in _some_of_each_task(made, limit):
        document, entry = made[number], track.mixture[plan.slots[number].part]
        shown.append(
            Shown(
                dataset=entry.dataset,
                key=document.key,
                task=document.task,
                template=f"{entry.template}, prompt dropped" if plan.dropped[number] else entry.template,
                tokens=len(document),
                targets=_targets(document),
                share=_targets(document) / in_step[document.task],
                stretches=list(_stretches(document, tokenizer)),
            )
        )
    per_task = {task: [document for document in made.values() if document.task == task] for task in TASKS}
    rows, row_tokens = batch.kinds_BT.shape
    return Inspection(
        title=title,
        rows=rows,
        row_tokens=row_tokens,
        fill=sum(map(len, made.values())) / (rows * row_tokens),
        tasks=[TaskShare(task, len(d), sum(map(_targets, d)), in_step[task]) for task, d in per_task.items()],
        routes=_routes(batch, layers),
        documents=shown,
        hidden=len(made) - len(shown),
        quarantined=quarantine.counts(),
    )


def _some_of_each_task(made: dict[int, Document], limit: int) -> list[int]:
    """Documents of every task in turn, at most `limit`, in the order of the batch."""
    before: Counter[Task] = Counter()
    rank = {}
    for number, document in made.items():
        rank[number] = before[document.task]
        before[document.task] += 1
    chosen = set(sorted(made, key=rank.__getitem__)[:limit])
    return [number for number in made if number in chosen]


def _targets(document: Document) -> int:
    is_generated = document.task == "generation"
    return len(document.codes_ND[: document.supervised_positions]) if is_generated else int(document.learned_T.sum())


def _stretches(document: Document, tokenizer: TextTokenizer) -> Iterator[Stretch]:
    is_generated = document.task == "generation"
    tokens = [
        ("image", kind, is_generated)
        if kind != TEXT
        else ("control" if tokenizer.control_token(number) else "text", number, learned)
        for kind, number, learned in zip(
            document.kinds_T.tolist(), document.text_ids_T.tolist(), document.learned_T.tolist(), strict=True
        )
    ]
    for (kind, learned), run in groupby(tokens, key=lambda token: (token[0], token[2])):
        numbers = [number for _, number, _ in run]
        if kind == "image":
            positions, depth = document.codes_ND.shape
            part = f", the first {_targets(document)} learned" if learned and _targets(document) < positions else ""
            yield Stretch("image", f"image {positions}x{depth} codes{part}", learned)
        elif kind == "control":
            yield Stretch("control", "".join(tokenizer.control_token(number) or "" for number in numbers), learned)
        else:
            yield Stretch("text", tokenizer.decode(numbers), learned)


def _routes(batch: Batch, plan: LayerPlan) -> list[tuple[str, str]]:
    """Where the tokens of the batch go in every kind of layer, and in the norm after the last one."""
    needed: set[RouteBy] = {kind.route for kind in plan.kinds} | {plan.norm_route}
    routes = batch_routes(batch, frozenset(needed))
    counts = Counter(plan.layers)
    lines = [
        (f"{times} x {name}", _route(KINDS[name].route, routes[KINDS[name].route])) for name, times in counts.items()
    ]
    return [*lines, ("final norm", _route(plan.norm_route, routes[plan.norm_route]))]


def _route(by: RouteBy, route: Route) -> str:
    parts = ", ".join(f"{name} {count}" for name, count in zip(BRANCHES[by], route.counts, strict=True))
    return f"{parts} tokens, padding included" + (", gathered" if route.order_X is not None else "")


def _identity(folder: Path) -> CodesIdentity:
    known = describe(folder)
    shape = known.architecture
    return CodesIdentity(shape.grid**2, shape.depth, known.codebook_id, known.encoder_id)


def _there(path: Path, command: str) -> Path:
    if not path.exists():
        raise DataError(f"{path}: not there yet; `{command}` makes it")
    return path


# ---------------------------------------------------------------------------------------- as text


def rendered(inspection: Inspection, marks: bool) -> Text:
    """An inspection as people read it: in colours, and with `marks` around learned tokens too."""
    text = Text()
    text.append(inspection.title + "\n", "bold")
    text.append(f"{inspection.rows} x {inspection.row_tokens} tokens, {inspection.fill:.1%} filled\n")
    for share in inspection.tasks:
        part = f"{share.targets / share.step_targets:.1%}" if share.step_targets else "nothing"
        unit = "image positions" if share.task == "generation" else "text tokens"
        text.append(
            f"{share.task}: {share.documents} documents, {share.targets} of the step's {share.step_targets} "
            f"learned {unit}, {part} of its loss\n"
        )
    for layers, route in inspection.routes:
        text.append(f"{layers}: {route}\n")
    for reason, count in inspection.quarantined.items():
        text.append(f"quarantined: {count} x {visible(reason)}\n", "yellow")
    for document in inspection.documents:
        text.append(f"\n{visible(document.dataset)} {visible(document.key)}", "bold")
        text.append(
            f", {document.task} ({document.template}), {document.tokens} tokens, {document.targets} learned, "
            f"{document.share:.1%} of the loss of {document.task}\n"
        )
        for learned, run in groupby(document.stretches, key=lambda stretch: stretch.learned):
            inside = Text()
            for stretch in run:
                inside.append(_written(stretch), LEARNED if learned else STYLES[stretch.kind])
            text.append_text(Text("[[") + inside + Text("]]") if learned and marks else inside)
        text.append("\n")
    if inspection.hidden:
        text.append(f"\n... and {inspection.hidden} more documents in this batch\n")
    return text


def _written(stretch: Stretch) -> str:
    match stretch.kind:
        case "text":
            return visible(stretch.text)
        case "control":
            return stretch.text
        case "image":
            return f"[{stretch.text}]"


def visible(text: str) -> str:
    r"""Text in one line of printing characters: `\`, `[`, `]` and `<` get a `\` in front, which marks never have;
    what does not print is written as Python writes it (`\n`, `\x1b`, `\u202e`).
    """
    return "".join(map(_visible, text))


def _visible(letter: str) -> str:
    if letter in "\\[]<":
        return f"\\{letter}"
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()
