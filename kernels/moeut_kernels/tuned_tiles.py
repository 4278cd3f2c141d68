"""Tiles that `python -m moeut_kernels.bench --tune` found faster than the static ones, kept in a file of the cache.

One file for each device model, torch, triton and state of the kernels: what was measured with others is never used.
It is read once a process. `MOEUT_KERNELS_CACHE` moves the folder, `MOEUT_KERNELS_TUNED=0` leaves the file unread.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from moeut_kernels.backend import TRITON_IS_INSTALLED

FOLDER = "MOEUT_KERNELS_CACHE"
SWITCH = "MOEUT_KERNELS_TUNED"
FORMAT = 1
MOST_BYTES = 1 << 20
"""A longer file is none of ours."""

Sizes = tuple[int, int, int, int, int]
"""Rows, columns, depth, warps and stages of a tile."""


@dataclass(frozen=True)
class Setting:
    """What a measurement holds for."""

    device: str
    """Model name of the device."""
    torch: str
    triton: str
    kernels: str
    """Digest of the sources of the kernels."""


@dataclass(frozen=True)
class Tuned:
    """What a file says; without one, or where it cannot be used, no product is named."""

    path: Path
    tiles: Mapping[str, Sizes]
    """Of the winners. Products that are not named keep their static tile."""
    problem: str | None = None
    """Why the file is not used."""


class Malformed(ValueError):
    """A file of tuned tiles that cannot be used, and why."""


def is_enabled() -> bool:
    """False where `MOEUT_KERNELS_TUNED` says 0, false, no or off."""
    return os.environ.get(SWITCH, "").strip().lower() not in ("0", "false", "no", "off")


def folder() -> Path:
    """`MOEUT_KERNELS_CACHE`; else `kernels` in `MOEUT_COMPOSE_CACHE`; else `moeut_kernels` in the user's cache."""
    if chosen := os.environ.get(FOLDER):
        return Path(os.path.expanduser(chosen))
    if chosen := os.environ.get("MOEUT_COMPOSE_CACHE"):
        return Path(os.path.expanduser(chosen)) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moeut_kernels"


def setting_of(device: torch.device) -> Setting:
    """The setting of this process on a CUDA device."""
    import triton

    name = torch.cuda.get_device_name(device)
    return Setting(name, str(torch.__version__), triton.__version__, _digest_of_kernels())


@cache
def _digest_of_kernels() -> str:
    """A tile that was measured, and fitted, with other kernels says nothing about these."""
    digest = sha256()
    here = Path(__file__).parent
    for source in [here / "plan.py", *sorted(here.glob("triton_*.py"))]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def path_of(setting: Setting) -> Path:
    """Where the winners of a setting lie. The kernels have no part in the name: a new file replaces an outdated one."""
    names = (setting.device, f"torch-{setting.torch}", f"triton-{setting.triton}")
    return folder() / ("_".join(re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") for name in names) + ".json")


def in_use(device: torch.device) -> Tuned | None:
    """The tuned tiles that products on a CUDA device take; None without any, or where they are switched off.

    A file that cannot be used is ignored, and warned about once.
    """
    if device.type != "cuda" or not TRITON_IS_INSTALLED or not is_enabled():
        return None
    tuned = look_up(device)
    if tuned.problem is not None:
        _warn(
            f"the tuned tiles in {tuned.path} are ignored: {tuned.problem}; delete the file, or tune again with "
            "`python -m moeut_kernels.bench --tune`"
        )
    return tuned if tuned.tiles else None


@cache
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def look_up(device: torch.device) -> Tuned:
    """What the file of a CUDA device says, whether or not it is switched off. Read once a process."""
    setting = setting_of(device)
    return _read_once(path_of(setting), setting)


@cache
def _read_once(path: Path, setting: Setting) -> Tuned:
    try:
        return Tuned(path, read(path, setting))
    except FileNotFoundError:
        return Tuned(path, {})
    except (Malformed, OSError) as error:
        return Tuned(path, {}, (error.strerror if isinstance(error, OSError) else None) or str(error))


def read(path: Path, setting: Setting) -> dict[str, Sizes]:
    """The winners in a file. Raises `Malformed`, or `OSError` where it cannot be read."""
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Malformed(f"it is longer than {MOST_BYTES} bytes")
    return parse(content, setting)


def parse(content: bytes, setting: Setting) -> dict[str, Sizes]:
    """The winners in the bytes of a file. Raises `Malformed`."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise Malformed("it is not JSON, or only a part of it") from None
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise Malformed("it is not a file of tuned tiles")
    if document["format"] != FORMAT:
        raise Malformed(f"its format is {document['format']}, not {FORMAT}")
    for name, here in asdict(setting).items():
        if document.get(name) != here:
            raise Malformed(f"its {name} is {str(document.get(name))[:60]!r}, not {here!r}")
    try:
        is_whole = document.get("checksum") == _checksum(document)
    except RecursionError:
        is_whole = False
    if not is_whole:
        raise Malformed("it was changed after it was written")
    tiles = document.get("tiles")
    if not isinstance(tiles, dict):
        raise Malformed("it has no tiles")
    return {product: check(product, sizes) for product, sizes in tiles.items()}


def _checksum(document: Mapping[str, Any]) -> str:
    """Of everything but the checksum: what else would tell a damaged number from a measured one?"""
    content = {key: value for key, value in document.items() if key != "checksum"}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def check(product: str, sizes: Any) -> Sizes:
    """Five numbers that may be a tile; 0 columns deep are tiles of walks. Raises `Malformed`."""
    if not isinstance(sizes, list | tuple) or len(sizes) != 5 or any(type(size) is not int for size in sizes):
        raise Malformed(f"the tile of {product} is not five integers")
    rows, columns, depth, warps, stages = sizes
    sides = (rows, columns) if depth == 0 else (rows, columns, depth)
    if (
        not all(_is_power(side, 16, 1024) for side in sides)
        or not _is_power(warps, 1, 32)
        or not 1 <= stages <= 16
    ):
        raise Malformed(f"{', '.join(map(str, sizes))} is no tile of {product}")
    return rows, columns, depth, warps, stages


def _is_power(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


def write(
    setting: Setting, tiles: Mapping[str, Sizes], trials: Sequence[Mapping[str, Any]], products: Sequence[str]
) -> Path:
    """Put the winners of `products`, and what was measured, in the file of the setting; return the file.

    Winners of other products stay, if the file that lies there is sound. It is replaced as a whole: who reads
    meanwhile sees the old one or the new one. Raises `OSError`.
    """
    path = path_of(setting)
    try:
        kept = {name: sizes for name, sizes in read(path, setting).items() if name not in products}
    except (Malformed, OSError):
        kept = {}
    winners = {name: check(name, sizes) for name, sizes in sorted({**kept, **tiles}.items())}
    document: dict[str, Any] = {"format": FORMAT, **asdict(setting), "tiles": winners, "trials": list(trials)}
    document["checksum"] = _checksum(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _read_once.cache_clear()
    return path
