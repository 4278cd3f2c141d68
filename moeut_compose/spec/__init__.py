"""Architectures and recipes as data: Pydantic and YAML, never torch."""
