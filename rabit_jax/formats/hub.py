"""Models on the Hugging Face hub: fetching them by id, and explaining the hub's errors."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from rabit_jax.errors import BadInput, first_line

ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_MODEL = ["*.json", "*.safetensors", "*.model", "*.jinja"]
_CARD = ["README.md", "LICENSE*"]
_IGNORED = ["consolidated*", "original/*", "onnx/*"]


@functools.cache
def fetch(name: str) -> Path:
    """The local folder of the hub's snapshot of a model, downloaded if it is missing.

    The hub is asked once per process, so that a long run reads one revision of config, weights
    and tokenizer, whatever is pushed in the meantime.

    Raises:
      BadInput: no such model, a gated one, no way to reach the hub, a full disk.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        try:
            found = snapshot_download(name, allow_patterns=_MODEL + _CARD, ignore_patterns=_IGNORED)
        except IncompleteSnapshotError:  # offline: the model may be complete without its card
            found = snapshot_download(name, allow_patterns=_MODEL, ignore_patterns=_IGNORED)
    except Exception as error:  # network, cache and hub raise many kinds
        raise BadInput(f"no model folder {name}, and {why(error, name)}") from error
    return Path(found)


def why(error: Exception, name: str) -> str:
    """What an error of huggingface_hub about the repository `name` means, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (f"{name} is gated on the hub: accept its licence at {constants.ENDPOINT}/{name} "
                "and run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"the hub has no {name} that you may read: check the name, or run "
                "`hf auth login` if it is private")
    if isinstance(error, errors.LocalTokenNotFoundError) or _status(error) == 401:
        return "you are not logged in to the hub: run `hf auth login`"
    if _status(error) == 403:
        return f"your token may not do that with {name} on the hub: run `hf auth login` with one " \
               "that may"
    if isinstance(error, errors.IncompleteSnapshotError):
        return (f"the hub cannot be reached while the copy of {name} on this machine is "
                f"incomplete: connect, or run `hf download {name}` where there is a network")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (f"the hub cannot be reached while this machine holds no copy of {name}: check the "
                "name, the network and HF_HUB_OFFLINE")
    transport = type(error).__module__.startswith("httpx")
    if isinstance(error, ConnectionError) or (transport and _status(error) is None):
        return f"the hub cannot be reached ({first_line(error)}): check the network"
    return f"the hub answered {type(error).__name__}: {first_line(error)}"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
