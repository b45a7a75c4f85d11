"""The model: text and image tokens in, both losses or hidden states out.

In: packed rows (`Batch`) whose image tokens are codes. Out: in training the sums of both losses,
computed inside the root module's forward so that sharded and tied weights are whole when they are
used; in decoding hidden states, with a cache. An image token enters as the sum of its D code vectors
through the connector; the codebook is a frozen table in the model, so codes are all it needs.

Both heads take part in every forward, with zero loss where they have no tokens, and so does every branch of
a model that is wrapped: reduced gradients are silently wrong otherwise. There is no dropout anywhere.

Shape suffixes: B or R rows, T tokens of a row, X = B*T, S keys or supervised text tokens, N image tokens,
M supervised image positions, D code depth, C code channels, K codebook rows, H hidden size, E head size, V words.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from unifork.batch import BEGIN_IMAGE, NO_DOCUMENT, TEXT, Batch
from unifork.errors import IdentityError, one_of
from unifork.identity import codebook_identity
from unifork.models.configuration import UniForkConfig, read_config
from unifork.models.decoder import (
    AttentionContext,
    Block,
    Cache,
    Linear,
    batch_routes,
    by_modality,
    family,
    masks_of,
    modalities,
    norms,
    routed,
    routes_of,
    step_routes,
)
from unifork.models.image_head import HEAD, HeadBlock, ImageHead
from unifork.models.layer_plan import BRANCHES, KINDS, RouteBy
from unifork.models.losses import linear_cross_entropy
from unifork.models.masks import VARLEN, attention_mask
from unifork.weights import StoredWeights, check_fit, shapes_of

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call] # bars for reading and writing a file say nothing here
# which accelerate, where both are installed, imports whenever a model is saved
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

MODEL_VERSION = 2
"""Raise when the same weights would compute something else, or the same seed draw other weights."""


class Losses(NamedTuple):
    """Sums of cross entropy over supervised targets, at least float32; whoever trains divides by global counts."""

    text_loss_sum: Tensor
    image_loss_sum_D: Tensor


class Connector(nn.Module):
    """Brings code vectors to the hidden size, and owns the begin and end of image embeddings."""

    def __init__(self, code_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(code_channels, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)
        self.token_embedding = nn.Embedding(2, hidden_size)
        """Row 0 begins an image, row 1 ends it."""

    def forward(self, code_sums_NC: Tensor) -> Tensor:
        """Image tokens (N, H) from the sums of their code vectors."""
        return cast(Tensor, self.linear2(F.gelu(self.linear1(code_sums_NC.to(self.linear1.weight.dtype)))))


class UniForkModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A unified model of any layer plan."""

    config_class = UniForkConfig
    config: UniForkConfig
    base_model_prefix = ""
    main_input_name = "batch"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["codebook"]
    every_branch = True
    """Whether branches without tokens are called in training, too."""

    def __init__(self, config: UniForkConfig) -> None:
        super().__init__(config)
        dense, plan = config.backbone_config(), config.layer_plan()
        parts = family(dense.model_type)
        H = dense.hidden_size
        self.plan = plan
        self.routes_needed = routes_of(plan)
        self.masks_needed = masks_of(plan)
        self.embed_tokens = nn.Embedding(dense.vocab_size, H)
        self.connector = Connector(config.code_channels, H)
        self.layers = nn.ModuleList([Block(name, dense, index, parts) for index, name in enumerate(plan.layers)])
        self.norm = norms(BRANCHES[plan.norm_route], dense)
        self.rotary_emb = parts.rotary(config=dense)
        self.lm_head = nn.Linear(H, dense.vocab_size, bias=False)
        self.image_head = ImageHead(config.head_config(), H, config.code_channels, config.codebook_size, config.depth)
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.code_channels))
        self.codebook: Tensor
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear  # also in transformers' modules, which make plain ones
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch) -> Losses:
        """Both losses of packed rows, summed over their supervised targets."""
        if self.routes_needed - {"none"} == {"modality"} and self.config._attn_implementation == VARLEN:
            batch = by_modality(batch)
        hidden_XH = self.hidden(batch).flatten(0, 1)
        text_SH = hidden_XH.index_select(0, batch.text_source_S)
        text_loss_S = linear_cross_entropy(text_SH, self.lm_head.weight, None, batch.text_target_S)
        image_MH = hidden_XH.index_select(0, batch.image_source_M)
        image_loss_MD = self.image_head.loss(image_MH, batch.image_target_MD, self.codebook)
        return Losses(text_loss_S.sum(), image_loss_MD.sum(0))

    def hidden(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Normed hidden states (B, T, H) of packed rows; with a cache, of the tokens that follow those in it."""
        documents, kinds, positions = batch.documents_BT, modalities(batch.kinds_BT), batch.positions_BT
        counts = batch.document_counts
        if cache is not None:
            counts = counts if cache.filled == 0 else ()
            positions = positions + cache.lengths_R[:, None]
            cache.extend(documents, kinds)
            documents, kinds = cache.documents_RS[:, : cache.reach], cache.modalities_RS[:, : cache.reach]
        x_BTH, name = self.embed(batch), self.config._attn_implementation
        # documents have one task each, so isolation by task is what every mask already says
        branches: dict[RouteBy, Tensor | None] = {"none": None, "task": None, "modality": kinds}
        seen = (positions.shape[1], self.embed_tokens.weight.dtype, counts, batch.places)
        masks = {route: attention_mask(name, documents, branches[route], *seen) for route in self.masks_needed}
        cos_BTE, sin_BTE = self.rotary_emb(x_BTH, positions)
        routes = batch_routes(batch, self.routes_needed, self.every_branch and torch.is_grad_enabled())
        return self._forward_layers(x_BTH, AttentionContext(routes, masks, cos_BTE, sin_BTE, name, cache))

    def read(self, batch: Batch, cache: Cache) -> Tensor:
        """Read the next tokens of documents, one a row. Returns the last one's hidden state (B, H)."""
        last_B = (batch.documents_BT != NO_DOCUMENT).sum(1) - 1
        return self.hidden(batch, cache)[torch.arange(len(last_B), device=last_B.device), last_B]

    def new_cache(self, rows: int, slots: int) -> Cache:
        """An empty cache for `rows` documents of `slots` tokens at most."""
        dense = self.config.backbone_config()
        attention: Any = next(iter(cast(Block, self.layers[0]).self_attn.values()))
        shape = (rows, dense.num_key_value_heads, slots, attention.head_dim)
        return Cache.empty(len(self.layers), shape, self.embed_tokens.weight)

    def decoder(self, cache: Cache, task: int, modality: int, *, whole: bool = False) -> Callable[[Tensor], Tensor]:
        """A function that reads one more token a row (R, H) and returns its hidden state (R, H).

        All tokens are of one task and one modality. Nothing is read from the device; with `whole` attention
        looks at all slots and every step does the same to the same memory, so it can be captured and replayed.
        """
        R, S = cache.documents_RS.shape
        weight = self.embed_tokens.weight
        routes = step_routes(R, task, modality)
        unseen_RS = cache.documents_RS == NO_DOCUMENT
        other_RS = unseen_RS | (cache.modalities_RS != modality)
        unseen = [(other_RS if route == "modality" else unseen_RS)[:, None, None] for route in self.masks_needed]
        masks = weight.new_zeros(len(unseen), R, 1, 1, S).masked_fill_(torch.stack(unseen), -torch.inf)
        tables_SE = [angles[0] for angles in self.rotary_emb(weight, torch.arange(S, device=weight.device)[None])]
        cache.slots_T, cache.reach = torch.tensor([cache.filled], device=weight.device), S

        def step(x_RH: Tensor) -> Tensor:
            cache.filled += 1
            if not whole:
                cache.reach = cache.filled
            masks.index_fill_(4, cache.slots_T, 0.0)
            cos_R1E, sin_R1E = (table_SE.index_select(0, cache.lengths_R)[:, None] for table_SE in tables_SE)
            within = dict(zip(self.masks_needed, masks[..., : cache.reach].unbind(), strict=True))
            reading = AttentionContext(routes, within, cos_R1E, sin_R1E, self.config._attn_implementation, cache)
            hidden_RH = self._forward_layers(x_RH[:, None], reading)[:, 0]
            cache.lengths_R += 1
            cache.slots_T += 1
            return hidden_RH

        return step

    def embed(self, batch: Batch) -> Tensor:
        """What enters the first layer (B, T, H): words, borders of images, and codes."""
        words_BTH = self.embed_tokens(batch.text_ids_BT)
        borders_BTH = self.connector.token_embedding((batch.kinds_BT > BEGIN_IMAGE).long())
        x_BTH = torch.where((batch.kinds_BT == TEXT)[..., None], words_BTH, borders_BTH.to(words_BTH.dtype))
        image_NH = self.embed_codes(batch.codes_ND).to(x_BTH.dtype)
        return x_BTH.flatten(0, 1).index_copy(0, batch.image_index_N, image_NH).view_as(x_BTH)

    def embed_codes(self, codes_ND: Tensor) -> Tensor:
        """Image tokens (N, H) from their codes."""
        return cast(Tensor, self.connector(self.codebook[codes_ND].sum(1)))

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary (..., V)."""
        return cast(Tensor, self.lm_head(hidden))

    def set_activation_checkpointing(self, kinds: Collection[str]) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed.

        kinds: of layers, as a plan names them, and `head` for the image head's. Raises ConfigError for others.
        """
        for name in kinds:
            one_of("kind of layer", name, (*KINDS, HEAD), "activation_checkpointing")
        for module in self.modules():
            if isinstance(module, Block | HeadBlock):
                module.activation_checkpointing = module.kind_name in kinds

    def compile_parts(self) -> None:
        """Compile what is position-wise, for any number of tokens: norms, MLPs, the head's blocks; weights are inputs.

        Attention, routes and losses stay as they are, and parameters keep their names. Once, after they are placed.
        """
        for module in self.modules():
            if isinstance(module, HeadBlock):
                module._layer = torch.compile(module._layer, dynamic=True)  # type: ignore[method-assign]
            elif isinstance(module, Block):
                for parts in (module.mlp, module.input_layernorm, module.post_attention_layernorm):
                    for part in parts.values():
                        part.compile(dynamic=True)

    def _forward_layers(self, x_BTH: Tensor, reading: AttentionContext) -> Tensor:
        x_XH = x_BTH.flatten(0, 1)
        for layer in self.layers:
            x_XH = layer(x_XH, reading)
        branches: dict[str, Any] = dict(self.norm.items())
        x_XH = routed(branches, reading.routes[self.plan.norm_route], lambda norm, part: norm(part), x_XH)
        return x_XH.view_as(x_BTH)


AutoModel.register(UniForkConfig, UniForkModel, exist_ok=True)


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> UniForkModel:
    """The model `save_pretrained` wrote. The codebook stays float32 whatever the dtype.

    Raises CheckpointError when a tensor is missing, unexpected, of another shape or unreadable, and
    IdentityError when the codebook is not the one the configuration names. Pickles are not read.
    """
    folder = Path(folder)
    config, weights = read_config(folder), StoredWeights(folder)
    with torch.device("meta"):
        wanted = shapes_of(UniForkModel(config).state_dict())
    if config.tie_word_embeddings and "lm_head.weight" not in weights.shapes:
        wanted.pop("lm_head.weight")
    check_fit(folder, weights.shapes, wanted)
    loaded: Any = UniForkModel.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True
    )
    model: UniForkModel = loaded
    found_id = codebook_identity(model.codebook, config.depth, config.grid)
    if found_id != config.codebook_id:
        raise IdentityError(
            f"{folder}: the codebook in the weights is {found_id}, config.json says {config.codebook_id}"
        )
    model.train(False)
    return model
