"""Documents of a mixture -> the packed microbatches of one worker.

Everything about a step follows from (seed, track, step): which documents, which prompts are
dropped, how they are packed and who gets which rows. A worker reads only the codes it needs.
Held-out documents are packed by the same code.

The order is a pure function of (seed, mixture, step), with O(1) seek. Slots are assigned to the data sets by a fixed
schedule that keeps every prefix within one document of the exact weights. The n-th slot of a set maps to (pass, index):
each pass has its own permutation, keyed by (seed, set, pass), of row groups first and then of documents inside windows
of row groups, so memory is flat and reads are local. Nothing there knows workers, packing or history.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from unifork.batch import Batch, Document, Packing, assign_rows_to_workers, pack, pack_step
from unifork.config import Track
from unifork.documents.mixture import CodesIdentity, MixturePart, Skeleton, unconditional
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError
from unifork.layout import Layout
from unifork.randomness import keyed, uniform

WINDOW_GROUPS = 64
"""Row groups shuffled together; with 256 rows a group, documents mix over 16,384 rows."""

MOST_SLOTS, BLOCK_SLOTS = 100_000, 4096
"""The longest period that is laid out whole, and the least slots of a block."""
LEAST_SHARE = Fraction(1, 1_000_000)
"""A smaller part of a mixture would make blocks that take seconds to lay out, for a document in a million."""


class Slot(NamedTuple):
    """One document of a step: which part of the mixture, which document of it."""

    part: int
    document: int


class SetOrder:
    """The endless order of one data set, by position."""

    def __init__(self, group_sizes: Sequence[int] | np.ndarray, *keys: object) -> None:
        """group_sizes: usable documents per row group, in file order."""
        self.sizes = np.array(group_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        self.keys = keys
        self.total = int(self.sizes.sum())
        if not self.total:
            raise ConfigError(f"{keys}: no usable document in this part of the mixture")
        self._pass = lru_cache(maxsize=2)(self._groups_of_pass)
        self._window = lru_cache(maxsize=4)(self._documents_of_window)

    def index(self, position: int) -> int:
        """The document at a position; positions beyond the last document begin another pass."""
        number, offset = divmod(position, self.total)
        _, ends = self._pass(number)
        window = int(np.searchsorted(ends, offset, side="right"))
        before = int(ends[window - 1]) if window else 0
        return int(self._window(number, window)[offset - before])

    def _groups_of_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        groups = keyed(*self.keys, number).permutation(len(self.sizes))
        counts = np.add.reduceat(self.sizes[groups], np.arange(0, len(groups), WINDOW_GROUPS))
        return groups, np.cumsum(counts)

    def _documents_of_window(self, number: int, window: int) -> np.ndarray:
        groups = self._pass(number)[0][window * WINDOW_GROUPS : (window + 1) * WINDOW_GROUPS]
        documents = np.concatenate([np.arange(self.starts[g], self.starts[g] + self.sizes[g]) for g in groups])
        return keyed(*self.keys, number, window).permutation(documents)


class Schedule:
    """Which part of a mixture each slot of a track belongs to: an endless sequence with an exact share for each part.

    After any number of slots every part is within one document of its exact share: the (j+1)-th document of a part
    with share s has the slots from floor(j/s) to ceil((j+1)/s) - 1, and at every slot, of the documents whose first
    slot has come, the one whose end is nearest is served (Bresenham's idea for many parts).

    A slot is found through its block: some periods of the shares, or, where one is too long to be laid out, at least as
    many slots as the smallest part needs for one document. How many documents of each part stand before a block follows
    from its number alone (`before`), in such a way that every block can be filled.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: as decimal fractions, which are never rounded. Raises ConfigError for a share below LEAST_SHARE."""
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        if min(shares) < LEAST_SHARE:
            raise ConfigError(
                f"mixture weights {list(weights)}: {weights[shares.index(min(shares))]} is a share below one document "
                f"in {1 / LEAST_SHARE}; raise it or leave it out"
            )
        self.period = math.lcm(*(share.denominator for share in shares))
        self.counts = [int(share * self.period) for share in shares]
        """Documents of each part in a period."""
        self.repeats = self.period <= MOST_SLOTS
        least = -(-self.period // min(self.counts))
        self.block_slots = self.period * -(-BLOCK_SLOTS // self.period) if self.repeats else max(BLOCK_SLOTS, least)
        self._before, self._laid_out = lru_cache(maxsize=4)(self.before), lru_cache(maxsize=2)(self._lay_out)

    def slot(self, slot: int) -> tuple[int, int]:
        """(part, how many of its documents were served before) of a slot."""
        number, offset = divmod(slot, self.block_slots)
        parts, ranks = self._laid_out(0 if self.repeats else number)
        part = int(parts[offset])
        return part, self._before(slot - offset)[part] + int(ranks[offset])

    def served(self, slots: int) -> list[int]:
        """Documents of each part in the first `slots` slots."""
        number, offset = divmod(slots, self.block_slots)
        parts, _ = self._laid_out(0 if self.repeats else number)
        counts = np.bincount(parts[:offset], minlength=len(self.counts))
        return [int(count) for count in self._before(slots - offset) + counts]

    def before(self, slot: int) -> list[int]:
        """Documents of each part before a slot at which a block begins: its exact share, rounded down or up.

        The border splits one document of every part whose share is no whole number there. Each of these must get a
        place in one of the two blocks. In the earlier block only so many places are left near its end (the sum of
        the fractions up to there) that the documents that have just begun cannot all stand in it; in the later one
        the same holds for those that are about to end. With places numbered from the border in both directions, each
        document may have the places of an interval around it, and the most urgent first fills them all: the fractions
        show that a matching exists.
        """
        served, open_fractions = zip(*(divmod(slot * count, self.period) for count in self.counts), strict=True)
        split = {part: fraction for part, fraction in enumerate(open_fractions) if fraction}
        begun = self._summed(split, lambda part: Fraction(split[part], self.counts[part]))
        rest = {part: self.period - fraction for part, fraction in split.items()}
        left = self._summed(rest, lambda part: Fraction(rest[part], self.counts[part]))
        before, ready = list(served), list[tuple[int, int]]()
        youngest_last = sorted(split, key=lambda part: begun[part])
        for place in range(slot - sum(served), 0, -1):
            while youngest_last and begun[youngest_last[-1]] >= place:
                part = youngest_last.pop()
                heapq.heappush(ready, (left[part], part))
            before[heapq.heappop(ready)[1]] += 1
        return before

    def _summed(self, fractions: dict[int, int], order: Callable[[int], Fraction]) -> dict[int, int]:
        """Part: the sum of the fractions up to its own in an order of the parts, rounded up."""
        parts = sorted(fractions, key=lambda part: (order(part), part))
        sums = accumulate(fractions[part] for part in parts)
        return {part: -(-total // self.period) for part, total in zip(parts, sums, strict=True)}

    def _lay_out(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Part of each slot of a block, and how many documents of that part stand before it in the block."""
        first = number * self.block_slots
        stop = first + self.block_slots
        before, ends = self.before(first), self.before(stop)
        parts, ranks = np.empty(self.block_slots, np.int32), np.empty(self.block_slots, np.int32)
        waiting = [(served * self.period // self.counts[part], part, served) for part, served in enumerate(before)]
        waiting = [entry for entry in waiting if entry[2] < ends[entry[1]]]
        heapq.heapify(waiting)
        ready: list[tuple[int, float, int, int]] = []
        for slot in range(first, stop):
            while waiting and waiting[0][0] <= slot:
                _, part, served = heapq.heappop(waiting)
                last = min(-(-(served + 1) * self.period // self.counts[part]), stop)
                heapq.heappush(ready, (last, (served + 1) / self.counts[part], part, served))
            _, _, part, served = heapq.heappop(ready)
            parts[slot - first], ranks[slot - first] = part, served - before[part]
            if served + 1 < ends[part]:
                heapq.heappush(waiting, ((served + 1) * self.period // self.counts[part], part, served + 1))
        return parts, ranks


class MixtureOrder:
    """The documents of every step of a track."""

    def __init__(self, weights: Sequence[float], sets: list[SetOrder], batch_documents: int) -> None:
        self.sets, self.batch_documents, self.schedule = sets, batch_documents, Schedule(weights)

    def documents(self, step: int) -> list[Slot]:
        """Exactly `batch_documents` documents."""
        first = step * self.batch_documents  # slots are counted over the whole track
        places = map(self.schedule.slot, range(first, first + self.batch_documents))
        return [Slot(part, self.sets[part].index(position)) for part, position in places]

    def served(self, steps: int) -> list[int]:
        """Documents of each part in the first `steps` steps."""
        return self.schedule.served(steps * self.batch_documents)


# ------------------------------------------------------------------------------------- steps and batches


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
    packing: Packing


class TrackLoader:
    """The documents of one track, in their order or any other, packed for a number of workers."""

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
        held_out: bool = False,
    ) -> None:
        """held_out: those that nothing is trained on, which have no order; parts may then be empty."""
        self.name, self.track, self.identity, self.seed = name, track, identity, seed
        self.row_tokens, self.rows_per_microbatch = row_tokens, rows_per_microbatch
        self.parts = [
            MixturePart(entry, layout, tokenizer, identity, context, held_out=held_out) for entry in track.mixture
        ]
        self.unconditional: Skeleton = unconditional(tokenizer, identity.positions)
        self.supervised_positions = track.supervised_positions or identity.positions
        if self.supervised_positions > identity.positions:
            raise ConfigError(
                f"track {name}: supervised_positions is {self.supervised_positions}; "
                f"an image has {identity.positions} positions"
            )
        if not held_out:
            weights = [entry.weight for entry in track.mixture]
            sets = [SetOrder(part.group_sizes, seed, name, number) for number, part in enumerate(self.parts)]
            self.order = MixtureOrder(weights, sets, track.batch_documents)

    def plan(self, step: int, workers: int) -> StepPlan:
        """Everything about a step but the codes."""
        slots = self.order.documents(step)
        return self.pack(slots, [self._drops(slot, step, number) for number, slot in enumerate(slots)], workers)

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
            packing=packing,
        )

    def batches(self, plan: StepPlan, worker: int) -> Iterator[Batch]:
        """The microbatches of one worker, in order."""
        for rows in plan.microbatches[worker]:
            documents = [[self.document(plan, number) for number in row] for row in rows]
            yield pack(documents, plan.packing.row_tokens, self.identity.depth)

    def document(self, plan: StepPlan, number: int) -> Document:
        """One document of a step, its prompt dropped or not as the plan says."""
        slot = plan.slots[number]
        part = self.parts[slot.part]
        if not plan.dropped[number]:
            return part.document(slot.document, self.supervised_positions)
        key, codes_ND = part.key(slot.document), part.codes(slot.document)
        return self.unconditional.with_codes(key, part.task, codes_ND, self.supervised_positions)

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
