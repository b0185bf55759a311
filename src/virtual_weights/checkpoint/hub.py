"""Checkpoints on the Hugging Face hub: ``hf://org/name@revision``.

Only such a reference ever contacts a hub, and only config.json, tokenizer.json, the index and the
safetensors files that it names are fetched, never a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import final

from virtual_weights.checkpoint.folder import INDEX, pin_inside, read_index
from virtual_weights.checkpoint.pinned_file import PinnedFile, recall, remember
from virtual_weights.errors import (
    MissingTensorError,
    OfflineError,
    ResourceError,
    UnsafeCheckpointError,
    UsageError,
    write_error,
)
from virtual_weights.progress import Progress, silent

_REFERENCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@final
@dataclass(frozen=True)
class HubModel:
    """A model of the hub at a revision; None is the hub's default."""

    repo: str
    revision: str | None


def parse_hub_reference(reference: str) -> HubModel:
    """Read ``hf://org/name`` or ``hf://org/name@revision``.

    Raises:
        UsageError: it does not look like that.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(
            f"{reference!r:.200} does not name a model on the hub",
            expected="hf://org/name or hf://org/name@revision",
            do="use this form; for a single file, fetch it and open its path",
        )
    return HubModel(match["repo"], match["revision"])


def fetch_snapshot(model: HubModel, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """Fetch what is needed of a model, or find it in the hub's cache.

    Args:
        model: which.
        offline: look into the cache only.
        progress: called with (weight files done, weight files in all).

    Returns:
        The snapshot's folder, whose name is the commit.

    Raises:
        OfflineError: not in the cache, and fetching is not allowed or failed.
        MissingTensorError: the hub has no such model, revision or safetensors file, or keeps it from us.
        UnsafeCheckpointError: the index names a file outside the model.
        ResourceError: the disk is full.
    """
    report = progress or silent
    with _quiet_bars(progress is not None):
        fetch = _fetcher(model, offline)
        config = fetch("config.json")
        if config is None:
            raise _missing(model, "has no config.json")
        folder = config.parent
        if fetch("tokenizer.json") is None:
            for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
                fetch(name)
        fetch("tokenizer_config.json")
        shards = ["model.safetensors"] if fetch(INDEX) is None else _shards(folder)
        for done, shard in enumerate(shards):
            report(done, len(shards))
            if fetch(shard) is None:
                raise _missing(model, f"has no {shard}")
        report(len(shards), len(shards))
    return folder


def published_sha256(file: PinnedFile) -> str | None:
    """The sha256 of a file's content, which is its name in the cache of the hub's library; None anywhere else.

    A file there that was changed in place since it was first seen here is not what its name says: None.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", file.path.name):
        return None
    from huggingface_hub import constants

    if not file.path.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        return None
    path, _, inode, *_ = stamp = file.identity()
    key, seen = (sha256(repr(part).encode()).hexdigest() for part in ((path, inode), stamp[:4]))
    if recall(key) is None:
        remember(key, seen)
    return file.path.name if recall(key) in (None, seen) else None


def _shards(folder: Path) -> list[str]:
    shards = sorted(set(read_index(pin_inside(folder, INDEX)).values()))
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise UnsafeCheckpointError(
                f"the index names a shard {shard!r:.200}",
                expected="bare names that end in .safetensors",
                do="do not use this checkpoint: a published one has no reason to point elsewhere",
            )
    return shards


def _fetcher(model: HubModel, offline: bool) -> Callable[[str], Path | None]:
    """A function that gives the path of a file, or None where the hub has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    revision, found = model.revision, False
    offline = offline or huggingface_hub.constants.is_offline_mode()

    def fetch(name: str) -> Path | None:
        nonlocal revision, found
        try:
            path = Path(huggingface_hub.hf_hub_download(model.repo, name, revision=revision, local_files_only=offline))
        except errors.LocalEntryNotFoundError as error:  # derives from EntryNotFoundError, so it comes first
            if offline and found:
                return None  # the snapshot is here without this file
            raise _unreachable(model, offline, error) from error
        except errors.EntryNotFoundError:
            return None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise _missing(model, "is not on the hub, or not for us") from error
        except errors.HFValidationError as error:
            raise _missing(model, f"is not a valid name on the hub ({error})") from error
        except (errors.HfHubHTTPError, OSError) as error:
            if isinstance(full := write_error("the hub's cache", error), ResourceError):
                raise full from error
            raise _unreachable(model, offline, error) from error
        except Exception as error:
            # each HTTP library has its own tree of connection errors, and which one is used has changed
            if type(error).__module__.split(".")[0] in {"requests", "httpx", "httpcore", "httpx2", "urllib3"}:
                raise _unreachable(model, offline, error) from error
            raise
        # the commit: a branch that moves meanwhile cannot mix two versions
        revision, found = path.parent.name, True
        return path

    return fetch


@contextmanager
def _quiet_bars(quiet: bool) -> Generator[None]:
    """Keep the hub's bars off while progress is reported elsewhere."""
    from huggingface_hub import utils

    change = quiet and not utils.are_progress_bars_disabled()
    if change:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if change:
            utils.enable_progress_bars()


def _missing(model: HubModel, what: str) -> MissingTensorError:
    return MissingTensorError(
        f"{model.repo} (revision {model.revision or 'main'}) {what}",
        expected="a model with config.json and safetensors files",
        do="check the name and revision; log in where the model is gated; convert it where it has only pickles",
    )


def _unreachable(model: HubModel, offline: bool, error: Exception) -> OfflineError:
    fault = "is not wholly in the hub's cache, and fetching is not allowed"
    reason = fault if offline else f"cannot be fetched: {error}"
    return OfflineError(
        f"{model.repo} (revision {model.revision or 'main'}) {reason}",
        expected="the model in the cache, or a hub that can be reached",
        do="fetch it once where the hub can be reached, or open a local folder",
    )
