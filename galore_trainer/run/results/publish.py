"""``push_to_hub``: the trained model, its tokenizer and its card go to the hub, once, after training.

The Trainer's own upload is not used: it would send the whole output folder, with predictions, local paths, and a card
that does not say what the model was trained on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from galore_trainer.errors import OptionError, one_line
from galore_trainer.hub import require_writer

if TYPE_CHECKING:
    from galore_trainer.run.settings.run_config import RunConfig

OPTION = "push_to_hub"
# Weights, configurations, vocabularies, chat templates, the card. Not training_args.bin, which names local paths.
UPLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
CODE = "*.py"  # of a model that brings its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a model goes.

    Attributes:
        repo_id: ``owner/name``.
        private: whether a new repository is; None for the owner's default.
        revision: the branch; None for main.
        code: the model's own Python files are uploaded, too.
    """

    repo_id: str
    private: bool | None
    revision: str | None
    code: bool = False


def check_publish(config: RunConfig) -> Destination | None:
    """Where the model of a run will go, asked before training; None without ``push_to_hub``. Changes nothing.

    Raises:
        OptionError: no network, nobody logged in, an id that the hub refuses or another's, or a setting that asks for
            more than the model.
    """
    settings = config.training
    if not settings.get(OPTION):
        return None
    strategy = settings.get("hub_strategy", "end")
    if strategy != "end":
        raise OptionError("hub_strategy", strategy, "end: the model is uploaded once, after training", "Remove it.")
    if settings.get("hub_always_push"):
        raise OptionError("hub_always_push", True, "false: there is one upload, after training", "Remove it.")
    folder = Path(config.output_dir).expanduser().absolute()
    upload = f"hf upload OWNER/NAME {folder / 'model'} --exclude training_args.bin"
    user, organizations = require_writer(OPTION, f"Leave it out, and upload the model later: {upload}.")
    repo_id = settings.get("hub_model_id") or folder.name
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OptionError("hub_model_id", repo_id, "a name that the hub accepts", f"It says: {error}") from error
    owner = repo_id.partition("/")[0]
    if owner not in (user, *organizations):
        raise OptionError("hub_model_id", repo_id, f"a name of {', '.join([user, *organizations])}, who is logged in")
    return Destination(
        repo_id=repo_id,
        private=settings.get("hub_private_repo"),
        revision=settings.get("hub_revision"),
        code=config.trust_remote_code,
    )


def publish(destination: Destination, folder: Path) -> str:
    """Upload the model in ``folder`` with its tokenizer and its card, and nothing else.

    Returns:
        The address of the model's page.

    Raises:
        RuntimeError: the upload failed; the model is where it was.
    """
    from huggingface_hub import HfApi

    api, repo_id, revision = HfApi(), destination.repo_id, destination.revision
    try:
        page = api.create_repo(repo_id, private=destination.private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*UPLOADED, *([CODE] if destination.code else [])],
            revision=revision,
            commit_message="Model trained with galore-trainer",
        )
    except Exception as error:  # the hub's client raises the classes of its transport
        again = f"hf upload {repo_id} {folder} --exclude training_args.bin"
        reason = one_line(error).rstrip(".")
        raise RuntimeError(f"the model is in {folder}, but was not uploaded: {reason}. Try: {again}") from error
    return str(page)
