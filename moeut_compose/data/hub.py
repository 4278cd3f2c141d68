"""Text from the Hugging Face hub, through `datasets`.

`datasets` is only a source of documents here: order, tokens and position are ours, so that resuming is exact.
Without a network, what lies in the local Hugging Face cache is used, and a dataset that is not there ends in
one clear error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from moeut_compose.data.errors import DataError
from moeut_compose.data.shards import StreamShard
from moeut_compose.data.split import is_held_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

    from moeut_compose.data.sources import Part
    from moeut_compose.spec.recipe import HuggingFaceData

WAYS_OUT = """ways out:
  - train on the built-in corpus: leave --recipe out
  - train on your own files: a recipe with data: {kind: text, files: [...]} or {kind: jsonl, files: [...]}
  - download the dataset on a machine with a network; then set HF_HOME to that folder here, with
    recipe.data.streaming=false (HF_HUB_OFFLINE=1 skips looking for a newer version)"""

_NO_CONTENT = {"separator", "max_tokens", "streaming", "workers"}
"""Options that change no document."""


class HubSource:
    """A dataset of the hub; streamed unless the recipe says otherwise."""

    def __init__(self, spec: HuggingFaceData) -> None:
        self._spec = spec
        self.is_remote = spec.streaming

    def shards(self, part: Part) -> list[StreamShard]:
        return [StreamShard(lambda: self.documents(part))]

    def documents(self, part: Part) -> Iterator[str]:
        spec = self._spec
        held_out = spec.validation_split is None
        split = spec.split if part == "train" or held_out else spec.validation_split
        folders: list[str | None] = [*spec.data_dirs] or [None]
        datasets = import_datasets()
        try:
            for text in take_turns([self._texts(datasets, split, folder) for folder in folders]):
                if not held_out or is_held_out(text, spec.validation_fraction) == (part == "validation"):
                    yield text
        except hub_failures() as error:
            raise DataError(f"cannot read the dataset {describe(spec)}: {error}\n{WAYS_OUT}") from error

    def fingerprint(self, part: Part) -> str:
        spec = self._spec.model_dump(mode="json", exclude=_NO_CONTENT)
        return json.dumps(["huggingface", spec, part], sort_keys=True)

    def _texts(self, datasets: ModuleType, split: str | None, folder: str | None) -> Iterator[str]:
        spec = self._spec
        rows = datasets.load_dataset(
            spec.dataset,
            spec.config,
            data_dir=folder,
            data_files=spec.data_files,
            revision=spec.revision,
            split=split,
            streaming=spec.streaming,
        )
        for row in rows:
            if spec.field not in row:
                raise DataError(
                    f"{describe(spec)} has no column {spec.field!r} (found: {', '.join(row)}); set data.field"
                )
            if isinstance(row[spec.field], str):
                yield row[spec.field]


def describe(spec: HuggingFaceData) -> str:
    """The dataset's name as a person would say it."""
    return spec.dataset + (f" ({spec.config})" if spec.config else "")


def take_turns(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """One item of each stream in turn; exhausted streams drop out."""
    waiting = list(streams)
    while waiting:
        for stream in list(waiting):
            try:
                yield next(stream)
            except StopIteration:
                waiting.remove(stream)


def import_datasets() -> ModuleType:
    """Import `datasets`, offline if the hub cannot be reached: else it would retry for half a minute."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    if (
        "huggingface_hub" not in sys.modules
        and not any(name in os.environ for name in offline)
        and not hub_answers()
    ):
        os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    return datasets


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the hub can be connected to; with a proxy set, assume so."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if endpoint.scheme in getproxies() or endpoint.hostname is None:
        return True
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=timeout).close()
    except OSError:
        return False
    return True


def hub_failures() -> tuple[type[BaseException], ...]:
    """What `datasets` raises when a dataset cannot be had, and the HTTP library that it came with."""
    found: list[Any] = [OSError, ValueError, RuntimeError]
    for name in ("httpx", "httpx2"):
        error = getattr(sys.modules.get(name), "HTTPError", None)
        if isinstance(error, type):
            found.append(error)
    return tuple(found)
