"""Where derived data lives: tokenizers and token files that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from moeut_compose.data.errors import DataError


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache, created if needed; `MOEUT_COMPOSE_CACHE` moves the cache."""
    chosen = os.environ.get("MOEUT_COMPOSE_CACHE")
    root = Path(chosen).expanduser() if chosen else user_cache_path("moeut-compose")
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the cache folder {folder}: {error.strerror or error}; "
            "name another in MOEUT_COMPOSE_CACHE"
        ) from error
    return folder
