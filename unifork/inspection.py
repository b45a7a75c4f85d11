"""What a training step really reads, as people read it: documents, supervised tokens, shares of the loss, routes.

In: an experiment's folder with its codes and tokenizers; no model is needed. Out: the text of one packed batch of
each track. The batch is the first one of the first worker, made by the loader that training uses. `[[ ]]` stands around
supervised tokens, `[image ...]` for an image and `<|...|>` for a control token. The same letters in what people wrote
are escaped, and so is everything that does not print: no text can look like a mark, or command the terminal.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, groupby, zip_longest
from pathlib import Path

import numpy as np
from rich.text import Text

from unifork.batch import BEGIN_IMAGE, IMAGE, TEXT, Batch, Document
from unifork.config import Cluster, Experiment, cluster_file, load
from unifork.documents.loader import StepPlan, TrackLoader
from unifork.documents.mixture import CodesIdentity
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError, one_of
from unifork.image_tokenizer.architecture import describe
from unifork.layout import Layout
from unifork.models.decoder import batch_routes
from unifork.models.layer_plan import BRANCHES, KINDS, LayerPlan, RouteBy
from unifork.shards.manifest import MANIFEST
from unifork.vocabulary import TASKS, VIEW_OF_TASK, Task

STYLES = {"text": "", "control": "cyan", "image": "magenta"}
SUPERVISED = "bold green"


def inspect(root: Path, variant: str, stage: str, step: int, documents: int, marks: bool) -> Iterator[Text]:
    """One batch of each track of a stage, at a step of that track, as people read it.

    documents: how many are shown; marks: put `[[ ]]` around supervised tokens, for who sees no colors.
    Raises ConfigError for a name or step that the experiment does not have, and DataError for what
    is not there yet, with the command that makes it.
    """
    layout = Layout(root)
    params = load(Experiment, _there(layout.params, "unifork use NAME"))
    architecture = params.variants[one_of("variant", variant, params.variants, "params.yaml: variants")]
    one_of("stage", stage, architecture.stages, f"params.yaml: variants.{variant}.stages")
    chosen, resources = params.stages[stage], load(Cluster, root / cluster_file()).for_stage(stage)
    workers = max(resources.fewest, 1)
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
        loader = TrackLoader(
            name, track, layout, tokenizer, identity,
            seed=architecture.seed, context=chosen.context, row_tokens=resources.row_tokens,
            rows_per_microbatch=resources.rows_per_microbatch,
        )  # fmt: skip
        plan = loader.plan(params.steps_before(stage)[name] + step, workers)
        batch = next(loader.batches(plan, 0))
        loaded = {number: loader.document(plan, number) for row in plan.microbatches[0][0] for number in row}
        title = f"{variant}, stage {stage}, track {name}, step {step} of {track.steps}"
        text = Text().append(f"{title}: batch 1 of {len(plan.microbatches[0])} of worker 1 of {workers}\n", "bold")
        for fact in (*_contents(batch, list(loaded.values()), plan), *_routes(batch, layers)):
            text.append(fact + "\n")
        for reason, count in loader.quarantined.most_common():
            text.append(f"quarantined: {count} x {visible(reason)}\n", "yellow")
        shown = _some_of_each_task(loaded, documents)
        for number in shown:
            entry, dropped = track.mixture[plan.slots[number].part], ", prompt dropped" * bool(plan.dropped[number])
            text.append(f"\n{visible(entry.dataset)} {visible(loaded[number].key)}", "bold")
            text.append_text(_document(loaded[number], entry.template + dropped, plan, tokenizer, marks))
        if len(loaded) > len(shown):
            text.append(f"\n... and {len(loaded) - len(shown)} more documents in this batch\n")
        yield text


def _there(path: Path, command: str) -> Path:
    if not path.exists():
        raise DataError(f"{path}: not there yet; `{command}` makes it")
    return path


def _some_of_each_task(loaded: dict[int, Document], limit: int) -> list[int]:
    """Documents of every task in turn, at most `limit`, in the order of the batch."""
    turns = zip_longest(*([number for number, document in loaded.items() if document.task == task] for task in TASKS))
    chosen = [number for number in chain.from_iterable(turns) if number is not None][:limit]
    return [number for number in loaded if number in chosen]


def _targets(document: Document) -> int:
    """Supervised text tokens, or image positions of a document of generation."""
    is_generated = document.task == "generation"
    return len(document.codes_ND[: document.supervised_positions]) if is_generated else int(document.loss_mask_T.sum())


def _step_targets(plan: StepPlan, task: Task) -> int:
    return plan.image_targets if task == "generation" else plan.text_targets


def _document(document: Document, template: str, plan: StepPlan, tokenizer: TextTokenizer, marks: bool) -> Text:
    """What a document is, and its tokens: those of one kind that are all supervised, or none, in one style."""

    def kind_of(token: int) -> tuple[bool, str]:
        if document.kinds_T[token] != TEXT:
            return document.task == "generation", f"image {begun_T[token]}"
        named = tokenizer.control_token(int(document.text_ids_T[token]))
        return bool(document.loss_mask_T[token]), "control" if named else "text"

    begun_T = np.cumsum(document.kinds_T == BEGIN_IMAGE)  # images that are side by side stay apart
    targets = _targets(document)
    share = f"{targets / _step_targets(plan, document.task):.1%} of the loss of {document.task}"
    text = Text(f", {document.task} ({template}), {len(document)} tokens, {targets} supervised, {share}\n")
    open_mark, close_mark = ("[[", "]]") if marks else ("", "")
    for supervised, tokens in groupby(range(len(document)), key=lambda token: kind_of(token)[0]):
        text.append(open_mark * supervised)
        for (_, kind), run in groupby(tokens, key=kind_of):
            places = list(run)
            ids = document.text_ids_T[places].tolist()
            if kind.startswith("image"):
                positions, depth = int((document.kinds_T[places] == IMAGE).sum()), document.codes_ND.shape[1]
                part = f", the first {targets} supervised" if supervised and targets < positions else ""
                content = f"[image {positions}x{depth} codes{part}]"
            elif kind == "control":
                content = "".join(tokenizer.control_token(token_id) or "" for token_id in ids)
            else:
                content = visible(tokenizer.decode(ids))
            text.append(content, SUPERVISED if supervised else STYLES[kind.split()[0]])
        text.append(close_mark * supervised)
    return text.append("\n")


def _contents(batch: Batch, documents: list[Document], plan: StepPlan) -> Iterator[str]:
    rows, row_tokens = batch.kinds_BT.shape
    yield f"{rows} x {row_tokens} tokens, {sum(map(len, documents)) / (rows * row_tokens):.1%} filled"
    for task in TASKS:
        targets = [_targets(document) for document in documents if document.task == task]
        whole = _step_targets(plan, task)
        part = f"{sum(targets) / whole:.1%}" if whole else "nothing"
        unit = "image positions" if task == "generation" else "text tokens"
        counted = f"{sum(targets)} of the step's {whole} supervised {unit}"
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


def visible(text: str) -> str:
    r"""Text in one line of printing characters: `\`, `[`, `]` and `<` get a `\` in front, which marks never have;
    what does not print is written as Python writes it (`\n`, `\x1b`, `\u202e`).
    """
    escaped = (f"\\{letter}" if letter in "\\[]<" else letter for letter in text)
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in escaped)
