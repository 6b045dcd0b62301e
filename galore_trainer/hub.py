"""Checks before a hub id is used: whether the hub can be reached, whether the cache has a copy, who is logged in.

huggingface_hub retries a request for up to a minute without a network; these checks report it within seconds.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

from galore_trainer.errors import OptionError, one_line

REQUEST_SECONDS = 2.0
ANSWER_SECONDS = 3.0  # longer: a request's timeout does not include name resolution


def require_hub(option: str, repo_id: str, repo_type: Literal["model", "dataset"], way_out: str) -> bool:
    """Make sure that a hub id can be loaded, within four seconds.

    Args:
        option: dotted name of the option that named the hub id, for the error.
        repo_id: ``owner/name``.
        repo_type: ``model`` or ``dataset``.
        way_out: what a user without a network can do instead.

    Returns:
        True where the hub answers; False where only the local cache has the repository, which the caller should then
        load with ``local_files_only=True`` or a similar option.

    Raises:
        OptionError: the hub does not answer (or ``HF_HUB_OFFLINE`` is set) and the cache holds no copy.
    """
    reason = out_of_reach()
    if reason is None:
        return True
    if is_cached(repo_id, repo_type):
        return False
    raise OptionError(option, repo_id, f"a {repo_type} at hand; {reason} and the local cache has no copy", way_out)


def require_dataset(option: str, repo_id: str) -> bool:
    """``require_hub`` for a data set; the way out is a local file."""
    return require_hub(option, repo_id, "dataset", local_file(option, repo_id))


def local_file(option: str, repo_id: str) -> str:
    """The way out for a data set that cannot be loaded, as a sentence."""
    return f"Without a network, give a local file instead: {option}=path/to/{repo_id.split('/')[-1]}.jsonl."


def require_model(option: str, repo_id: str, embedded: str) -> bool:
    """``require_hub`` for a model; the way out is a folder, or ``embedded``, a model that needs no network."""
    way_out = f"No folder has this name either. Give one that exists, or {embedded}."
    return require_hub(option, repo_id, "model", way_out)


def require_writer(option: str, way_out: str) -> tuple[str, list[str]]:
    """Make sure that a model can be uploaded later on: the hub answers, and the user may write.

    Args:
        option: the option that asks for the upload, for the error.
        way_out: what a user without a network can do instead.

    Returns:
        The user's name, and the names of the organizations that the user belongs to.

    Raises:
        OptionError: no network, nobody logged in, or a token that may only read.
    """
    if reason := out_of_reach():
        raise OptionError(option, True, f"a hub to upload to; {reason}", way_out)
    from huggingface_hub import HfApi

    wanted, login = "a login that may write", "Set the environment variable HF_TOKEN, or run 'hf auth login'."
    try:
        user = HfApi().whoami()
    except Exception as error:  # no token, a revoked token or a broken connection raise many kinds of exceptions
        reason = one_line(error).rstrip(".")
        raise OptionError(option, True, wanted, f"The hub says: {reason}. {login}") from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise OptionError(option, True, wanted, f"The token of {user['name']} may only read. {login}")
    return user["name"], [organization["name"] for organization in user.get("orgs", ())]


def out_of_reach() -> str | None:
    """Why the hub cannot be used now, in words; None where it can be used."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    failure = probe(constants.ENDPOINT)
    return None if failure is None else f"{constants.ENDPOINT} cannot be reached ({failure})"


def probe(endpoint: str) -> str | None:
    """Send one request to ``endpoint``; None where anything answers, else the reason in a few words."""
    outcome: list[str | None] = []

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            get_session().head(endpoint, timeout=REQUEST_SECONDS)
            outcome.append(None)
        except Exception as error:  # transports raise many kinds of exceptions; all mean that the hub cannot be used
            outcome.append(str(error) or type(error).__name__)

    # in a thread, which is abandoned after a while: name resolution cannot be interrupted
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return outcome[0] if outcome else f"no answer within {ANSWER_SECONDS:g} seconds"


def is_cached(repo_id: str, repo_type: Literal["model", "dataset"]) -> bool:
    """Whether the local cache has a copy that the libraries load without a network."""
    if repo_type == "dataset":
        from datasets import config
        from datasets.naming import camelcase_to_snakecase

        *owner, name = repo_id.split("/")
        folder = Path(config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
        return any(folder.glob("*/*/*"))
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    return any(folder.glob("snapshots/*/config.json"))
