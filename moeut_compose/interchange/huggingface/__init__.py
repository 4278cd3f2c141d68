"""Runs as folders that `transformers` loads without this package, and back."""
