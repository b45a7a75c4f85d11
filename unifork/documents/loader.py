"""Documents of a mixture -> the packed microbatches of one worker.

Everything about a step follows from (seed, track, step): which documents, which prompts are
dropped, how they are packed and who gets which rows. A worker reads only the codes it needs.
Held-out documents are packed by the same code.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from unifork.batch import Batch, Document, pack
from unifork.config import Track
from unifork.documents.mixture import CodesIdentity, MixturePart, Skeleton, unconditional
from unifork.documents.order import MixtureOrder, SetOrder, Slot, assign_rows_to_workers, pack_step
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError
from unifork.layout import Layout
from unifork.randomness import uniform


@dataclass(frozen=True)
class StepPlan:
    """A whole step, the same on every worker.

    text_targets and image_targets are the global counts of supervised text tokens and of
    supervised image positions; the loss divides by them, on whatever worker a document lies.
    """

    slots: list[Slot]
    dropped: list[bool]
    keys: list[str]
    lengths: list[int]
    microbatches: list[list[list[list[int]]]]
    text_targets: int
    image_targets: int
    row_tokens: int
    fill: float


class PackedDocuments:
    """Any documents of the parts of a mixture, packed for a number of workers."""

    def __init__(
        self,
        track: Track,
        layout: Layout,
        tokenizer: TextTokenizer,
        identity: CodesIdentity,
        *,
        context: int,
        row_tokens: int,
        rows_per_microbatch: int,
        held_out: bool = False,
    ) -> None:
        """held_out: of the documents that nothing is trained on; parts may then be empty."""
        self.track, self.identity = track, identity
        self.row_tokens, self.rows_per_microbatch = row_tokens, rows_per_microbatch
        self.parts = [
            MixturePart(entry, layout, tokenizer, identity, context, held_out=held_out) for entry in track.mixture
        ]
        self.unconditional: Skeleton = unconditional(tokenizer, identity.positions)
        self.supervised_positions = track.supervised_positions or identity.positions

    def pack(self, slots: list[Slot], dropped: list[bool], workers: int) -> StepPlan:
        """How some documents are packed, those with a dropped prompt without it: everything but the codes."""
        parts = [self.parts[slot.part] for slot in slots]
        lengths = [
            len(self.unconditional.kinds_T) if drop else part.length(slot.document)
            for part, slot, drop in zip(parts, slots, dropped, strict=True)
        ]
        tasks = [part.task for part in parts]
        packing = pack_step(lengths, tasks, self.row_tokens, workers * self.rows_per_microbatch)
        text = sum(part.supervised(slot.document) for part, slot in zip(parts, slots, strict=True))
        images = sum(part.task == "generation" for part in parts)
        return StepPlan(
            slots=slots,
            dropped=dropped,
            keys=[part.key(slot.document) for part, slot in zip(parts, slots, strict=True)],
            lengths=lengths,
            microbatches=assign_rows_to_workers(packing.rows, workers, self.rows_per_microbatch),
            text_targets=text,
            image_targets=images * self.supervised_positions,
            row_tokens=packing.row_tokens,
            fill=packing.fill,
        )

    def batches(self, plan: StepPlan, worker: int) -> Iterator[Batch]:
        """The microbatches of one worker, in order."""
        for rows in plan.microbatches[worker]:
            documents = [[self.document(plan, number) for number in row] for row in rows]
            yield pack(documents, plan.row_tokens, self.identity.depth)

    def document(self, plan: StepPlan, number: int) -> Document:
        """One document of a step, its prompt dropped or not as the plan says."""
        slot = plan.slots[number]
        part = self.parts[slot.part]
        if not plan.dropped[number]:
            return part.document(slot.document, self.supervised_positions)
        key, codes_ND = part.key(slot.document), part.codes(slot.document)
        return self.unconditional.with_codes(key, part.task, codes_ND, self.supervised_positions)


class TrackLoader(PackedDocuments):
    """The documents of one track in their order, for one worker of many."""

    def __init__(
        self,
        name: str,
        track: Track,
        layout: Layout,
        tokenizer: TextTokenizer,
        identity: CodesIdentity,
        *,
        seed: int,
        context: int,
        row_tokens: int,
        rows_per_microbatch: int,
    ) -> None:
        super().__init__(
            track, layout, tokenizer, identity,
            context=context, row_tokens=row_tokens, rows_per_microbatch=rows_per_microbatch,
        )  # fmt: skip
        self.name, self.seed = name, seed
        self.order = MixtureOrder(
            [entry.weight for entry in track.mixture],
            [SetOrder(part.group_sizes, seed, name, number) for number, part in enumerate(self.parts)],
            track.batch_documents,
        )
        if self.supervised_positions > identity.positions:
            raise ConfigError(
                f"track {name}: supervised_positions is {self.supervised_positions}; "
                f"an image has {identity.positions} positions"
            )

    def plan(self, step: int, workers: int) -> StepPlan:
        """Everything about a step but the codes."""
        slots = self.order.documents(step)
        return self.pack(slots, [self._drops(slot, step, number) for number, slot in enumerate(slots)], workers)

    @property
    def quarantined(self) -> Counter[str]:
        """Rows of all parts that are not trained on, as `data set: reason`."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts.update({f"{part.entry.dataset}: {reason}": count for reason, count in part.quarantined.items()})
        return counts

    def seen(self, steps: int) -> dict[str, int]:
        """Documents of each data set and task in the first `steps` steps, as `documents_<task>_<data set>`."""
        counts: dict[str, int] = {}
        for part, served in zip(self.parts, self.order.served(steps), strict=True):
            name = f"documents_{part.task}_{part.entry.dataset}"
            counts[name] = counts.get(name, 0) + served
        return counts

    def _drops(self, slot: Slot, step: int, number: int) -> bool:
        part = self.parts[slot.part]
        if part.task != "generation" or not self.track.prompt_drop:
            return False
        return uniform(self.seed, self.name, step, number) < self.track.prompt_drop
