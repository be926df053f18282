"""Where a model is: a folder, or a repository on the Hugging Face hub. No other file asks the hub.

The hub is asked once per process whether it has a model, without retries. If it cannot be reached,
everything comes from the local cache, or the run stops at once: left to themselves, the libraries
retry each of a dozen files for a minute. A name that can only be a path never reaches the hub.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from hdp.installation import pip_install

# First parts of a name that no user or organization of the hub can have.
_RESERVED = frozenset({"models", "datasets", "spaces", "docs", "tasks", "api", "settings", "join"})
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_FILE_TYPES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PROBES = ("config.json", "tokenizer_config.json", "tokenizer.json")
_TIMEOUT_S = 10.0


def local_path(model: str | os.PathLike) -> Path | None:
    """The file or folder that `model` names; None if it is the name of a hub repository.

    Raises ValueError if it can only be a path, and nothing is there.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    first = name.partition("/")[0]
    is_path = (
        not isinstance(model, str)
        or not _REPO.fullmatch(name)
        or name.endswith(_FILE_TYPES)
        or ("/" in name and (first in _RESERVED or Path(first).is_dir()))
    )
    if is_path:
        raise ValueError(f"no such file or folder (looked for {path.absolute()})")
    return None


def is_offline(name: str) -> bool:
    """Whether repository `name` must come from the cache, as the hub cannot be reached.

    Raises ValueError, with the remedy, if the hub has no such model or refuses access to it, and if
    the hub cannot be reached and the cache does not have it either.
    """
    reason = _unreachable(name)
    if reason is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    if not any(isinstance(try_to_load_from_cache(name, probe), str) for probe in _PROBES):
        raise ValueError(
            f"the hub cannot be reached ({reason}) and the cache does not have {name!r}; download "
            f"it where there is a network (hf download {name})"
        )
    return True


@functools.cache
def _unreachable(name: str) -> str | None:
    """Why the hub cannot be asked about `name`; None if it can, and has it."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise ValueError(
            f"models from the hub require huggingface_hub: {pip_install('hf')}"
        ) from None
    try:
        get_hf_file_metadata(hf_hub_url(name, _PROBES[0]), timeout=_TIMEOUT_S)
    except GatedRepoError as error:  # before its base class
        raise ValueError(
            f"access to {name!r} is restricted: request it at https://huggingface.co/{name}, then "
            "log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no model {name!r}, or it is private: check the name, log in with "
            "`hf auth login`, or pass a folder"
        ) from error
    except EntryNotFoundError:
        return None  # the repository is there
    except Exception as error:  # no network, a proxy, a server in trouble, offline mode
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def fetch_checkpoint(name: str) -> Path:
    """The folder that has the config and weights of repository `name`, downloaded if necessary.

    Safetensors if there are any, else PyTorch's format. Raises ValueError if there are no weights.
    """
    from .weight_files import INDEX_SUFFIX, WEIGHT_FILES, names_in_index

    offline = is_offline(name)
    for file in ("config.json", "generation_config.json"):
        _download(name, file, offline)
    for file in WEIGHT_FILES:
        path = _download(name, file, offline)
        if path is None:
            continue
        if file.endswith(INDEX_SUFFIX):
            for shard in names_in_index(path):
                _download(name, shard, offline)
        return path.parent
    raise ValueError(f"no file named {' or '.join(WEIGHT_FILES)}")


def _download(name: str, file: str, offline: bool) -> Path | None:
    """The local copy of a repository's file; None if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        if not offline:  # the download failed
            raise ValueError(f"cannot download {file} of {name!r}: {error}") from error
        return None
    except EntryNotFoundError:
        return None
