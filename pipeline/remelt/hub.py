"""Where a checkpoint's files are: a local folder as it is, or a Hub id fetched through huggingface_hub.

A source is a local path if it exists or starts with ".", "/" or "~"; anything else is a Hub id `org/name[@revision]`.
Local paths never touch the network. huggingface_hub is imported only for a Hub id.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from remelt.errors import CheckpointError

# What a merge reads or carries over; never *.py, which would be code of the checkpoint's author.
ALLOWED_FILES = (
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "*.txt",
    "LICENSE*",
    "README.md",
)
# Sub-folders hold other exports of the same weights (original/, onnx/), `consolidated*` a second copy of them.
IGNORED_FILES = ("*/*", "consolidated*.safetensors", "*.py", "*.bin", "*.pt")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def is_local(source: str) -> bool:
    """Whether `source` means a path on this machine: it exists, or is written as a path."""
    if source.startswith((".", "/", "~")):
        return True
    try:
        return source != "" and Path(source).exists()
    except OSError:
        # Too long a name, or a folder that may not be searched: no path that could be used.
        return False


def resolve_source(source: str, *, cache_dir: str | None = None, local_files_only: bool = False) -> Path:
    """Find the local folder of a checkpoint, fetching it from the Hub where `source` is a Hub id.

    Args:
        source: a path, or `org/name[@revision]`.
        cache_dir: the Hub's cache; huggingface_hub's own default (HF_HOME) where None.
        local_files_only: take a Hub id from the cache alone.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not give it.
    """
    if is_local(source):
        return _local_folder(source)
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"checkpoint {source!r} does not exist: no such folder under {Path.cwd()}, and it is no Hub id of the form "
            "org/name or org/name@revision; check the path"
        )
    return _fetch_snapshot(source, cache_dir, local_files_only)


def _local_folder(source: str) -> Path:
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        found = "it is a file: name the folder that holds it" if path.exists() else "no such folder; check the path"
    except (OSError, RuntimeError) as error:
        # RuntimeError: a home folder that is not known.
        found = f"{error}; check the path"
    raise CheckpointError(f"checkpoint {source} does not exist as a folder: {found}")


def leads_outside(root: Path, path: Path) -> bool:
    """Whether a path ends outside a checkpoint's folder, as a link may; the Hub's own blobs count as inside.

    In the Hub's cache snapshots/<revision>/<name> is a link to ../../blobs/<hash>.
    """
    real_root, real = root.resolve(), path.resolve()
    blobs = real_root.parent.parent / "blobs" if real_root.parent.name == "snapshots" else real_root
    return not (real.is_relative_to(real_root) or real.is_relative_to(blobs))


def _fetch_snapshot(source: str, cache_dir: str | None, local_files_only: bool) -> Path:
    # Rust and Python progress bars would print from inside a library that prints nothing.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(ALLOWED_FILES),
            ignore_patterns=list(IGNORED_FILES),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:160]
        raise CheckpointError(
            f"checkpoint {source} does not exist here, and the Hub did not give it ({type(error).__name__}: {reason}). "
            "A local folder: check the path, and write it with ./ or / to keep off the network. The Hub: check name, "
            "revision and network; for a gated one, `hf auth login`"
        ) from error
    return Path(folder)
