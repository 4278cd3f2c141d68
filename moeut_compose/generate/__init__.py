"""Writing text with a trained model: one prompt or many, streamed or whole, step by step or as a CUDA graph."""

from moeut_compose.generate.sampling import Sampling
from moeut_compose.generate.writing import Generator, Writing, generate

__all__ = ["Generator", "Sampling", "Writing", "generate"]
