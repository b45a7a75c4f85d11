"""The model against the original's numbers: image head, forward passes, gradients, greedy decoding.

In: a fixture folder with an official checkpoint (`unifork/`, `vision_tower/`, `tokenizer/`) and the
tensors of 02_head, 03_llm, 03_grads and 05_generate. Out: one comparison for every tensor of these
that is computed. What the originals were given is given here too and not compared: token ids of the
training batch, images, backbone vectors, logits to sample from. Sizes and settings come from the folder.

The original pads rows, and its padding reads the row's tokens; padding here reads nothing. What it
computes at padding is therefore taken from the dense model a branch is (`dense_branch`).

Shape suffixes: B rows, T tokens of a row, N image positions, D code depth, H hidden size, K codebook
rows, V words.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.parity.comparison import Comparison, Reference
from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, NO_DOCUMENT, TEXT, Batch, Document, pack
from unifork.config import Sampling
from unifork.documents.prompts import Piece
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.models.conversion import dense_branch, from_official, official_config, official_names
from unifork.models.generation import answer_texts, generate_images, guide, probabilities
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import PAD, TURN_END, Task
from unifork.weights import StoredWeights, read_json

HEAD, LLM, GRADS, GENERATE = "02_head", "03_llm", "03_grads", "05_generate"

NUMBERS, LOSSES = 1e-4, 1e-5
"""Absolute tolerances of float32 logits and hidden states, and of losses (the fixtures' README)."""
GRADIENTS = 1e-3
"""Of a gradient's norm; also for its sum, which may be near zero, and for each of its elements."""
NO_GRADIENT = 1e-6
"""What rounding leaves of a gradient that is zero: a key's bias in the head moves all scores alike."""
LOW_PRECISION = 2**-5
"""Of the largest value: a few times bfloat16's 2**-8, whose errors add up over the blocks."""
LOW_PRECISION_PIXELS = 0.1 * 127.5
"""Of 255: twice what the README expects between bfloat16 kernels."""

IGNORED, IMAGE_STARTS = -100, -1
"""Labels of the original: nothing is supervised; the head begins to predict after this token."""


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Every computed tensor of the model's part of a fixture folder.

    Raises CheckpointError when the official checkpoint in it cannot be read.
    """
    original = Original.read(folder)
    yield from _head(original)
    yield from _forward(original)
    yield from _decoding(original)


@dataclass(frozen=True, eq=False)
class Original:
    """A fixture folder with its checkpoint, imported."""

    folder: Path
    model: UniForkModel
    tokenizer: ImageTokenizer
    supervised: int
    """Positions of an image that carry loss."""

    @classmethod
    def read(cls, folder: Path) -> "Original":
        """Import the checkpoint of a fixture folder. Raises CheckpointError."""
        checkpoint = folder / "unifork"
        plain = read_json(checkpoint / "config.json")
        image_size = load_file(folder / f"{LLM}.safetensors")["batch.images_gen"].shape[-1]
        tokenizer = read_official(checkpoint, image_size, folder / "vision_tower")
        tower, codebook = read_json(folder / "vision_tower" / "config.json"), tokenizer.quantizer.codebook
        grid = tokenizer.architecture.grid
        config = official_config(plain, tower, codebook, grid, tokenizer.encoder_id, str(checkpoint))
        model = from_official(StoredWeights(checkpoint), config, codebook)
        return cls(folder, model, tokenizer, int(plain.get("image_token_num", config.positions)))


@torch.no_grad()
def _head(original: Original) -> Iterator[Comparison]:
    given, head, codebook_KC = Reference(original.folder, HEAD), original.model.image_head, original.model.codebook
    hidden_MH, codes_MD = given["teacher.embed_from_body"].flatten(0, 1), given["teacher.code"].flatten(0, 1)
    logits_MDK = head(hidden_MH, codes_MD, codebook_KC)
    yield from given.compare({"teacher.logits": logits_MDK.view_as(given["teacher.logits"])}, NUMBERS)
    low, expected = copy.deepcopy(head).to(torch.bfloat16), given["teacher.logits_bf16"]
    logits_MDK = low(hidden_MH.to(torch.bfloat16), codes_MD, codebook_KC)
    yield from given.compare(
        {"teacher.logits_bf16": logits_MDK.view_as(expected)}, LOW_PRECISION * float(expected.abs().max())
    )

    for name, number in given.matching(r"(generate_cfg([\d.]+))\.hidden"):
        scale = float(number)
        with _recorded(head.classifier) as calls:
            codes_RD = head.unroll(given[f"{name}.hidden"][:, 0], codebook_KC, partial(_likeliest, scale))
        codes = codes_RD[:, None]
        guided = torch.stack([guide(logits_R1K[:, 0], scale) for _, logits_R1K in calls])
        yield from given.compare({f"{name}.codes": codes})
        yield from given.compare(
            {f"{name}.out_features": codebook_KC[codes].sum(-2), f"{name}.guided_logits": guided}, NUMBERS
        )

    filters = r"(sampling\.filtered_probs_(?:temp([\d.]+)_)?topk(\d+)_topp([\d.]+))"
    for name, temperature, top_k, top_p in given.matching(filters):
        sampling = Sampling(temperature=float(temperature or 1), top_k=int(top_k), top_p=float(top_p))
        logits_BK = given["sampling.logits"]
        codes_BW, likely_BW, _ = probabilities(logits_BK, sampling, logits_BK.shape[1])
        yield from given.compare({name: torch.zeros_like(logits_BK).scatter(1, codes_BW, likely_BW)}, NUMBERS)


def _likeliest(scale: float, logits_RK: Tensor, _depth: int) -> Tensor:
    """The likeliest codes under guidance, for the conditional rows and the unconditional ones."""
    return guide(logits_RK, scale).argmax(-1).repeat(2)


def _forward(original: Original) -> Iterator[Comparison]:
    given, model = Reference(original.folder, LLM), original.model
    codes_BND = {task: original.tokenizer.encode(given[f"batch.images_{task[:3]}"]) for task in ("gen", "und")}
    documents = _documents(original, given, codes_BND)
    yield from given.compare(
        {"gen.image_codes": codes_BND["gen"], "batch.labels": _unexpanded_labels(documents, given)}
    )
    quantized_BNC = original.tokenizer.quantizer.lookup(codes_BND["gen"])
    yield from given.compare({"gen.image_features_z_q": quantized_BNC}, NUMBERS)

    losses = _losses(model, _packed(original, documents))
    both = losses["und"] + losses["gen"]
    yield from given.compare({"und.loss": losses["und"], "gen.loss": losses["gen"], "mixed.loss": both}, LOSSES)
    yield from _gradients(original, given, both)

    with torch.no_grad():
        for task, name in (("understanding", "und"), ("generation", "gen")):
            batch = _packed(original, [document for document in documents if document.task == task])
            yield from given.compare({f"{name}_only.loss": _losses(model, batch)[name]}, LOSSES)
            real_BT = batch.documents_BT != NO_DOCUMENT
            labels = _text_labels(batch) if name == "und" else _code_labels(batch)
            yield from given.compare({f"{name}.attention_mask": real_BT, f"{name}.labels": labels})
            embedded_BTH = model.embed(batch) * real_BT[..., None]
            shared_BTH, last_BTH = _hidden(model, batch, embedded_BTH, real_BT, task)
            numbers = {f"{name}.inputs_embeds": embedded_BTH, f"{name}.last_hidden": last_BTH}
            if name == "und":
                for stored, stride in given.matching(r"(und\.logits_every(\d+))"):
                    numbers[stored] = model.text_logits(last_BTH[:, :: int(stride)])
            else:
                source_MH = last_BTH.flatten(0, 1)[batch.image_source_M]
                logits_MDK = model.image_head(source_MH, batch.image_target_MD, model.codebook)
                numbers["gen.logits"] = logits_MDK.view_as(given["gen.logits"])
                numbers["gen.hidden_after_shared_layers"] = shared_BTH
            yield from given.compare(numbers, NUMBERS)


def _gradients(original: Original, given: Reference, loss: Tensor) -> Iterator[Comparison]:
    model = original.model
    names = official_names(model)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {names[name]: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    for name, official in given.matching(r"(grad\.(.+))"):
        largest = GRADIENTS * float(given[name].norm())
        yield from given.compare({name: found[official].view_as(given[name])}, largest)
    stored = read_json(original.folder / f"{GRADS}.json")
    expected = torch.tensor([stored["loss"]])
    yield Comparison(GRADS, "loss", expected, loss.detach().view(1).to(expected.dtype), LOSSES)
    for name, norm_and_sum in stored["grad_l2norm_and_sum"].items():
        norm, total = norm_and_sum or (0.0, 0.0)
        expected = torch.tensor([norm, total], dtype=torch.float64)
        grad = found[name].double() if name in found else torch.zeros(1, dtype=torch.float64)
        actual = torch.stack([grad.norm(), grad.sum()])
        yield Comparison(GRADS, name, expected, actual, max(GRADIENTS * norm, NO_GRADIENT))


@torch.no_grad()
def _decoding(original: Original) -> Iterator[Comparison]:
    given, model = Reference(original.folder, GENERATE), original.model
    notes = read_json(original.folder / f"{GENERATE}.json")["notes"]
    ids_BL, D = given["input_ids"], model.config.depth
    boi = np.append(np.full(ids_BL.shape[1], TEXT), BEGIN_IMAGE)
    rows = [_document("generation", boi, np.append(ids, 0), np.zeros((0, D))) for ids in ids_BL.numpy()]
    text = TextTokenizer(original.folder / "tokenizer")
    written = [text.encode_pieces([Piece(prompt_text, control=True)])[0].tolist() for prompt_text in notes["texts"]]
    padding = [ids_BL.shape[1] - len(ids) for ids in written]
    padded = [[text.id_of(PAD)] * left + ids for left, ids in zip(padding, written, strict=True)]
    seen = torch.arange(len(boi)) >= torch.tensor(padding)[:, None]
    yield from given.compare({"input_ids": torch.tensor(padded), "attention_mask": seen})
    embedded = model.embed(pack([[row] for row in rows], len(boi), D))

    real_BL = given["attention_mask"][:, : ids_BL.shape[1]].bool()
    prompts = [ids[real].tolist() for ids, real in zip(ids_BL, real_BL, strict=True)]
    half, head = len(prompts) // 2, model.image_head
    with _recorded(head.hidden_proj) as steps, _recorded(head.classifier) as depths:
        likeliest = Sampling(guidance=notes["cfg"], top_k=1)
        codes_BND = generate_images(model, prompts[:half], prompts[half], likeliest)
    guided = torch.stack([guide(logits_R1K[:, 0], notes["cfg"]) for _, logits_R1K in depths])
    quantized_BNC = original.tokenizer.quantizer.lookup(codes_BND)
    yield from given.compare({"codes": codes_BND})
    numbers = {
        "prompt_embeds_with_boi": embedded,
        "hidden_per_step": torch.stack([hidden_RH for hidden_RH, _ in steps], 1),
        "guided_logits": guided.view(-1, D, *guided.shape[1:]),
        "image_embeds": quantized_BNC,
        "image_fp32_raw": original.tokenizer.decode(codes_BND),
    }
    low = copy.deepcopy(original.tokenizer).to(torch.bfloat16)
    pixels = ((low.draw(quantized_BNC).float() + 1) * 127.5).clamp(0, 255)
    yield from given.compare({"image_bf16_0_255": pixels}, LOW_PRECISION_PIXELS)

    image = Reference(original.folder, LLM)["batch.images_und"][:1]  # the prompt is about the batch's first image
    ids_T = given["text.prompt_ids"][0].numpy()
    prompt = _expanded("understanding", ids_T, np.zeros(len(ids_T), bool), original.tokenizer.encode(image)[0].numpy())
    with _recorded(model.lm_head) as words:
        answer = answer_texts(model, [prompt], given["text.new_ids"].shape[1], stop_id=-1)
    yield from given.compare({"text.new_ids": torch.tensor(answer)})
    yield from given.compare({**numbers, "text.step_logits": torch.cat([logits_BV for _, logits_BV in words])}, NUMBERS)


def _documents(original: Original, given: Reference, codes_BND: dict[str, Tensor]) -> list[Document]:
    """The samples of the training batch, in its order; images are counted per task, as the original does."""
    spelling = _spelling(original.folder / "tokenizer")
    documents, counted = [], {"gen": 0, "und": 0}
    for ids_T, real_T, is_gen in zip(
        given["batch.input_ids"], given["batch.attention_mask"].bool(), given["batch.is_gen"].tolist(), strict=True
    ):
        kind = "gen" if is_gen else "und"
        task: Task = "generation" if is_gen else "understanding"
        ids = ids_T[real_T].numpy()
        supervised = np.zeros(len(ids), bool) if is_gen else _answers([spelling.get(n, "") for n in ids.tolist()])
        documents.append(_expanded(task, ids, supervised, codes_BND[kind][counted[kind]].numpy()))
        counted[kind] += 1
    return documents


def _spelling(folder: Path) -> dict[int, str]:
    """Every token as it is spelled in the files of a byte-level tokenizer (a space is `Ġ`)."""
    spelling = {number: token for token, number in read_json(folder / "vocab.json").items()}
    added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    return spelling | {int(number): token["content"] for number, token in added.items()}


def _answers(tokens: Sequence[str]) -> np.ndarray:
    """Which tokens the conversation format teaches: every answer with its leading space, and the end of its turn."""
    text, starts = "".join(tokens), np.cumsum([0, *map(len, tokens)])[:-1]
    supervised = np.zeros(len(tokens), bool)
    for answer in re.finditer(rf"(?<=ĠASSISTANT:).*?{re.escape(TURN_END)}", text):
        supervised |= (starts >= answer.start()) & (starts < answer.end())
    return supervised


def _expanded(task: Task, ids_T: np.ndarray, loss_mask_T: np.ndarray, codes_ND: np.ndarray) -> Document:
    """A document from ids in which a negative one marks the image."""
    block = np.array([BEGIN_IMAGE, *[IMAGE] * len(codes_ND), END_IMAGE])
    times = np.where(ids_T < 0, len(block), 1)
    kinds = np.concatenate([block if number < 0 else np.array([TEXT]) for number in ids_T])
    codes = codes_ND if (ids_T < 0).any() else codes_ND[:0]
    document = _document(task, kinds, np.maximum(ids_T, 0).repeat(times), codes)
    return replace(document, loss_mask_T=loss_mask_T.repeat(times))


def _document(task: Task, kinds_T: np.ndarray, ids_T: np.ndarray, codes_ND: np.ndarray) -> Document:
    return Document("", task, kinds_T, ids_T, np.zeros(len(kinds_T), bool), codes_ND.astype(np.int64))


def _packed(original: Original, documents: list[Document]) -> Batch:
    """One document a row; of each image to be generated the positions that the original supervises."""
    rows = [[replace(document, supervised_positions=original.supervised)] for document in documents]
    return pack(rows, max(map(len, documents)), original.model.config.depth)


def _losses(model: UniForkModel, batch: Batch) -> dict[str, Tensor]:
    """Means over supervised targets, shape (1); not a number for a task without any."""
    losses = model(batch)
    text = losses.text_loss_sum / len(batch.text_target_S)
    return {"und": text.view(1), "gen": (losses.image_loss_sum_D.sum() / batch.image_target_MD.numel()).view(1)}


def _hidden(
    model: UniForkModel, batch: Batch, embedded_BTH: Tensor, real_BT: Tensor, branch: str
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, H) that enter the first forked layer, and those after the last norm."""
    forked = next(index for index, kind in enumerate(model.plan.kinds) if kind.route == "task")
    with _recorded(model.layers[forked]) as calls:
        last_BTH = model.hidden(batch)
    dense: Any = dense_branch(model, branch)
    dense.set_attn_implementation("eager")
    padded = dense.model(inputs_embeds=embedded_BTH, attention_mask=real_BT.long(), output_hidden_states=True)
    shared_BTH = torch.where(real_BT[..., None], calls[0][0].view_as(last_BTH), padded.hidden_states[forked])
    return shared_BTH, torch.where(real_BT[..., None], last_BTH, padded.last_hidden_state)


def _unexpanded_labels(documents: Sequence[Document], given: Reference) -> Tensor:
    """Labels of the collator, where an image is one marker: that of an image to be generated is its own label."""
    labels_BT = torch.full_like(given["batch.labels"], IGNORED)
    for row, document in enumerate(documents):
        marker = document.kinds_T == BEGIN_IMAGE
        kept = (document.kinds_T == TEXT) | marker
        label = np.where(document.loss_mask_T, document.text_ids_T, IGNORED)
        if document.task == "generation":
            label = np.where(marker, int(given["batch.input_ids"].min()), label)
        labels_BT[row, : kept.sum()] = torch.from_numpy(label[kept])
    return labels_BT


def _text_labels(batch: Batch) -> Tensor:
    labels_X = torch.full_like(batch.kinds_BT, IGNORED).flatten()
    labels_X[batch.text_source_S + 1] = batch.text_target_S
    return labels_X.view_as(batch.kinds_BT)


def _code_labels(batch: Batch) -> Tensor:
    labels_BTD = torch.full((*batch.kinds_BT.shape, batch.codes_ND.shape[1]), IGNORED)
    labels_BTD[batch.kinds_BT == BEGIN_IMAGE] = IMAGE_STARTS
    labels_BTD[batch.kinds_BT == IMAGE] = batch.codes_ND
    return labels_BTD


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a module was given first, and what it made of it, for every call inside."""
    calls: list[tuple[Tensor, Tensor]] = []
    with module.register_forward_hook(lambda _, given, output: calls.append((given[0], output))):
        yield calls
