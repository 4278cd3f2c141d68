"""Configuration of exported models: the resolved architecture, and the sizes by the names `transformers` knows."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class MoeutComposeConfig(PreTrainedConfig):
    """`architecture` is the architecture file that the model was trained with, every default written out.

    `num_hidden_layers` counts applications, not weights: a layer that runs nine times has nine caches.
    """

    model_type = "moeut_compose"
    architecture: dict[str, Any] | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True
