"""Writes shards, then tokenises them with hardly more memory than it needs to start. Argument: folder."""

import gzip
import json
import resource
import sys
from pathlib import Path

import pyarrow
import sentencepiece  # noqa: F401 (so that its memory counts from the start)
from pyarrow import parquet

from moeut_compose.data import tokenising
from moeut_compose.data.sources import JsonlSource
from moeut_compose.data.tokens import write_tokens

TEXT = "to sea! " * 8192
N_DOCUMENTS = 256
"""Documents of 64 KiB in each of four shards."""


class Quick:
    """A tokenizer that costs no time: one id for eight characters."""

    vocab_size = 100

    def encode_batch(self, texts, *, num_threads):
        return [[7] * (len(text) // 8) for text in texts]


def write_shards(folder: Path) -> list[Path]:
    line = json.dumps({"text": TEXT}) + "\n"
    paths = [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")]
    files = [
        paths[0].open("wb"),
        gzip.GzipFile(paths[1], "wb", compresslevel=1),
        pyarrow.output_stream(str(paths[2]), compression="zstd"),
    ]
    for file in files:
        with file:
            for _ in range(N_DOCUMENTS):
                file.write(line.encode())
    with parquet.ParquetWriter(
        paths[3], pyarrow.schema([("text", pyarrow.string())]), use_dictionary=False
    ) as writer:
        for _ in range(N_DOCUMENTS // 8):
            writer.write_table(pyarrow.table({"text": [TEXT] * 8}))
    return paths


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    source = JsonlSource(write_shards(folder), [], field="text", fraction=0.0)
    tokenising._JOURNAL_BYTES = 1 << 20
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (now + (24 << 20), now + (24 << 20)))
    write_tokens(folder / "tokens", source.shards("train"), Quick(), workers=1)
