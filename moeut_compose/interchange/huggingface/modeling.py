"""Language models for `transformers`: the model that was trained behind the interface that is expected there."""

from __future__ import annotations

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
        elif self.loads and module is not self:
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
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each of `input_ids [B, T]`.

        `labels [B, T]` are the ids themselves, -100 where a token does not count; they are shifted here. Raises
        ValueError for a cache of another kind than `DynamicCache`.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        cache = None if past_key_values is None else recall(past_key_values)
        out = self.model(input_ids, cache=cache)
        if past_key_values is not None:
            remember_all(past_key_values, out.cache)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size)
            loss = loss + sum(out.losses.values())
        logits = out.logits[:, -logits_to_keep:] if logits_to_keep else out.logits
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def recall(past: KeyValueCache) -> Cache:
    """What a cache of `transformers` holds, as our model takes it. Raises ValueError for other kinds of cache."""
    if not isinstance(past, DynamicCache) or any(type(layer) is not DynamicLayer for layer in past.layers):
        raise ValueError(f"past_key_values must be a plain DynamicCache, got {type(past).__name__}")
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
