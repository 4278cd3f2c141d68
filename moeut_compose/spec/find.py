"""Where specs live: by path, in `$MOEUT_COMPOSE_PATH`, below the current folder, and built in, in this order.

Built-in specs lie inside an installed wheel, and next to the package in an editable install or a bare checkout.
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["architectures", "recipes"]
KINDS: tuple[Kind, ...] = ("architectures", "recipes")
SUFFIXES = (".yaml", ".yml")
PATH_VARIABLE = "MOEUT_COMPOSE_PATH"


class NotFound(LookupError):
    """No spec (or run) of that name; the message holds the nearest ones."""


class Listed(NamedTuple):
    """A spec that a name finds."""

    name: str
    path: Path
    builtin: bool


def singular(kind: Kind) -> str:
    return kind.removesuffix("s")


def with_article(kind: Kind) -> str:
    return "an architecture" if kind == "architectures" else "a recipe"


def builtin_root(kind: Kind) -> Path:
    """The folder of the built-in specs of a kind. Raises `RuntimeError` in a broken installation."""
    package = Path(str(files("moeut_compose")))
    for root in (package / kind, package.parent / kind):
        if root.is_dir():
            return root
    raise RuntimeError(f"built-in {kind} not found, neither in {package} nor beside it")


def _search_folders() -> list[Path]:
    """The folders that may hold `architectures/` and `recipes/`, apart from the built-in ones."""
    named = os.environ.get(PATH_VARIABLE, "").split(os.pathsep)
    return [Path(folder).expanduser() for folder in named if folder] + [Path()]


def find(name: str, kind: Kind) -> Path:
    """The file that a name or path stands for.

    A run or checkpoint folder stands for the spec stored in it. Raises `NotFound` with the nearest names.
    """
    path = Path(name).expanduser()
    looks_like_path = bool(path.suffix) or len(path.parts) > 1 or path.is_absolute()
    if looks_like_path and (found := _file_at(path, kind)):
        return found
    stem = _stem(path, kind)
    for folder in _search_folders():
        for root in (folder / kind, folder):
            if found := _in_root(root, stem):
                return found
    if found := _in_root(builtin_root(kind), stem) or _file_at(path, kind):
        return found
    raise NotFound(not_found(name, kind))


def reference(name: str, kind: Kind, folder: Path) -> str:
    """What `extends` says in a file of `folder` to mean what `name` finds here. Raises `NotFound`."""
    found = find(name, kind)
    return os.path.relpath(found, folder) if Path(name).exists() else name


def list_specs(kind: Kind) -> list[Listed]:
    """All specs that a name finds, the first of each name, sorted by name."""
    found: dict[str, Listed] = {}
    roots = [(folder / kind, False) for folder in _search_folders()] + [(builtin_root(kind), True)]
    for root, builtin in roots:
        for path in _specs_in(root):
            name = path.relative_to(root).with_suffix("").as_posix()
            found.setdefault(
                name, Listed(name, path, builtin or path.resolve().is_relative_to(builtin_root(kind)))
            )
    return [found[name] for name in sorted(found)]


def name_of(path: Path, kind: Kind) -> str:
    """The name that finds this file, or its path if none does."""
    return next((spec.name for spec in list_specs(kind) if spec.path.samefile(path)), str(path))


def nearest(word: str, known: Sequence[str], n: int = 3) -> list[str]:
    """The known words that a misspelt one may mean, nearest first."""
    lowered = {name.lower(): name for name in reversed(known)}
    matches = difflib.get_close_matches(word.lower(), lowered, n=n, cutoff=0.6)
    return [lowered[match] for match in matches]


def did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _specs_in(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES and path.is_file())


def _stem(path: Path, kind: Kind) -> Path:
    """A name without the folder of its kind and without a suffix."""
    parts = path.parts
    if len(parts) > 1 and parts[0] == kind:
        path = Path(*parts[1:])
    return path.with_suffix("") if path.suffix in SUFFIXES else path


def _in_root(root: Path, stem: Path) -> Path | None:
    if not stem.name:  # "." and "/" name folders
        return None
    for suffix in SUFFIXES:
        path = root / stem.with_name(stem.name + suffix)
        if path.is_file():
            return path
    return None


def _file_at(path: Path, kind: Kind) -> Path | None:
    """The path itself, or the spec stored in a run or checkpoint folder."""
    if path.is_dir() or path.parent.name == "checkpoints":
        stored = f"{singular(kind)}.yaml"
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        return next((folder / stored for folder in (path, run) if (folder / stored).is_file()), None)
    return path if path.exists() else None


def not_found(name: str, *kinds: Kind) -> str:
    """Why no spec of these kinds has this name, and what it may have meant."""
    path = Path(name).expanduser()
    known = {kind: [spec.name for spec in list_specs(kind)] for kind in KINDS}
    words = " nor ".join(with_article(kind) for kind in kinds)
    for other in KINDS:
        if other not in kinds and _stem(path, other).as_posix() in known[other]:
            return f"{name} is {with_article(other)}, and {words} is needed here"
    if path.is_dir():
        stored = " or ".join(f"{singular(kind)}.yaml" for kind in kinds)
        return f"{name} is a folder without {stored}; name a file, a run or a checkpoint"
    stem = _stem(path, kinds[0])
    names = [known_name for kind in kinds for known_name in known[kind]]
    by_last_part = [known_name for known_name in names if known_name.rpartition("/")[2] == stem.name]
    near = by_last_part or nearest(stem.as_posix(), names)
    return f"{name} is neither {words} nor a file{did_you_mean(near)}"
