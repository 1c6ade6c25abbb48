"""A push of a finished run: the files of a list, to a repository that stays as private as it was asked to be."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi

from hf_objectives.errors import ConfigError, PushError
from hf_objectives.trainers import CARD_FILES, listed_files, model_files, reason_of
from hf_objectives.types import parse_json


def files_to_push(folder: Path) -> list[str]:
    """The model, its card and what the card rests on, as paths from the folder.

    Raises:
        ConfigError: the folder holds no weights in safetensors, or an adapter whose base nobody else can load.
    """
    model = model_files(folder)
    if not any(name.endswith(".safetensors") for name in model):
        raise ConfigError(f"{folder} holds no model.safetensors and no adapter; give the output folder of a run")
    if "adapter_config.json" in model:
        check_base(parse_json((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path"))
    return [*model, *listed_files(folder, CARD_FILES)]


def check_base(base: str | None) -> None:
    """Check that an adapter to be pushed is one of a model that others can load.

    Raises:
        ConfigError: its base is a folder of this machine, or built in.
    """
    if not base or base.startswith(("/", ".", "builtin")) or Path(base).exists():
        raise ConfigError(
            f"the adapter's base model is {base!r}, which nobody else can load; train on the id of a repository, or push a "
            "model whose adapter is merged"
        )


def push(
    folder: Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "End of training",
) -> str:
    """Upload a finished run; its folder stays as it is.

    Args:
        folder: the output folder of a run.
        repo_id: the repository, made where there is none; None names it after the folder.
        private: whether a new repository is private; None leaves that to the settings of its owner.
        revision: the branch, made where there is none; None is the main one.
        token: of the Hub; None takes that of the login.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        PushError: the upload failed; names the reason and the command that tries again, without the token.
        ConfigError: see `files_to_push`.
    """
    names, name = files_to_push(folder), repo_id or folder.absolute().name
    try:
        api = HfApi(token=token)
        url = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=names, revision=revision, commit_message=message
        )
    except Exception as error:  # of any kind: the run is done, and all that is lost is the upload
        raise PushError(
            f"{folder} is not on the Hub ({reason_of(error)}); it is whole on disk, try again with: "
            f"{retry(folder, name, private=private, revision=revision)}"
        ) from error
    return str(url)


def retry(folder: Path, name: str, *, private: bool | None, revision: str | None) -> str:
    """The command that pushes again."""
    words = ["hf-objectives", "push", str(folder), "--hub_model_id", name]
    words += [] if private is None else ["--private", str(private).lower()]
    words += [] if revision is None else ["--revision", revision]
    return shlex.join(words)
