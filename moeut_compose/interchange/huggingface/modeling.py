"""Language models for `transformers`: the model that was trained behind the interface that is expected there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache as KeyValueCache
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from moeut_compose.blocks.cache import Cache
from moeut_compose.blocks.roles import Position
from moeut_compose.build import build_model
from moeut_compose.interchange.huggingface.configuration import MoeutComposeConfig
from moeut_compose.spec.model import ModelSpec

UNSUPPORTED = ("inputs_embeds", "position_ids", "token_type_ids")
"""What callers of `transformers` may pass, and what would be wrong to ignore."""


class MoeutComposeForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder-only language model over stages of shared layers.

    `past_key_values` has one layer for each application of a layer, because the keys of a shared layer differ
    at every depth. In training the loss includes the balance and halting terms of the architecture.
    """

    config_class = MoeutComposeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ("Stage",)
    _supports_sdpa = True

    def __init__(self, config: MoeutComposeConfig) -> None:
        super().__init__(config)
        if config.architecture is None:
            raise ValueError("the configuration describes no architecture")
        place = torch.empty(0).device
        seed = 0 if place.type == "meta" else int(torch.randint(2**31, ()))
        spec = ModelSpec(**config.architecture)
        self.model = build_model(spec, device=place, dtype=torch.get_default_dtype(), seed=seed)
        self.loads = place.type == "meta"
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are drawn where the model is built, or loaded; tables belong to neither.

        Raises ValueError for a checkpoint that lacks weights.
        """
        if isinstance(module, Position):
            module.fill_tables()
        elif self.loads:
            weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not all(getattr(weight, "_is_hf_initialized", False) for weight in weights):
                raise ValueError(f"the checkpoint lacks weights of {type(module).__name__}")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each of `input_ids [B, T]`.

        `attention_mask [B, S]` is zero where earlier positions and `input_ids` are filled up, on either side. `labels
        [B, T]` are the ids themselves, -100 where a token does not count; they are shifted here. Raises ValueError for
        a cache of another kind than `DynamicCache`, a mask of another length, and inputs that this model has no place
        for; positions are those of the text, without what fills it up.
        """
        for name in UNSUPPORTED:
            if others.get(name) is not None:
                raise ValueError(f"{name} has no place in this model")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        cache = None if past_key_values is None else recall(past_key_values)
        back = None
        if attention_mask is not None and not bool(attention_mask.all()):
            order, cache = tokens_first(attention_mask, cache, n_new=input_ids.shape[1])
            input_ids, back = input_ids.gather(1, order), order.argsort(1)
        last = None
        if logits_to_keep == 1 and labels is None:
            ends = input_ids.new_full(input_ids.shape[:1], input_ids.shape[1] - 1)
            last = ends if back is None else back[:, -1]
        out = self.model(input_ids, cache=cache, logits_at=last)
        if past_key_values is not None:
            remember_all(past_key_values, out.cache)
        logits = out.logits
        if back is not None and last is None:
            logits = logits.take_along_dim(back[:, :, None], 1)
        loss = None
        if labels is not None:
            n_items = others.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=n_items)
            loss = loss + sum(out.losses.values())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits[:, -logits_to_keep:], past_key_values=past_key_values
        )


def tokens_first(mask: Tensor, cache: Cache | None, *, n_new: int) -> tuple[Tensor, Cache | None]:
    """Texts of unequal length as the model takes them: tokens first, and what fills them up behind.

    The order `[B, T]` of the new positions, and the cache with room behind the tokens of each text. Nobody attends to
    what lies behind, and every text has the positions that it would have alone.
    """
    n_seen = 0 if cache is None else int(cache.length)
    if mask.shape[1] != n_seen + n_new:
        raise ValueError(
            f"attention_mask has length {mask.shape[1]}, not {n_seen} cached + {n_new} new positions"
        )
    order = (mask[:, n_seen:] != 0).long().argsort(dim=1, descending=True, stable=True)
    if cache is None or n_seen == 0:
        return order, cache
    return order, cache.with_room((mask[:, :n_seen] != 0).sum(1), n_seen + n_new)


def recall(past: KeyValueCache) -> Cache:
    """What a cache of `transformers` holds, as our model takes it. Raises ValueError for other kinds of cache."""
    if type(past) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in past.layers):
        raise ValueError(
            f"past_key_values must be a DynamicCache of full attention, got {type(past).__name__}"
        )
    if past.offloading:
        raise ValueError("past_key_values must stay on the device of the model, not be offloaded")
    if past.get_seq_length() == 0:
        return Cache()
    return Cache(past.get_seq_length(), tuple((layer.keys, layer.values) for layer in past.layers))


def remember_all(past: KeyValueCache, cache: Cache) -> None:
    """Put what our model remembers into a cache of `transformers`, one layer for each application."""
    for index, (keys, values) in enumerate(cache.memories):
        if index >= len(past.layers) or not past.layers[index].is_initialized:
            past.update(keys, values, index)
        else:
            past.layers[index].keys, past.layers[index].values = keys, values
