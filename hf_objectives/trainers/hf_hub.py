"""Contacts with private parts of transformers' Trainer that write the Hub's token and push.

`tests/trainers/test_hf_hub.py` holds these contacts against the installed release.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_objectives.errors import PushError
from hf_objectives.trainers.hub_contents import CARD_FILES, checkpoint_files, listed_files, model_files

logger = logging.getLogger(__name__)

_LAST = "last-checkpoint"  # the Trainer's name for the newest checkpoint on the Hub
_FAILED = "%s is not on the Hub (%s); the run goes on, and pushes again at its end"
_STAGED = "_push"  # of the run's folder: what is on its way, so that rotation takes no file of it


class HubPushes:
    """A Trainer that writes no token to disk and pushes files by a list; a mixin that stands before the Trainer.

    The Trainer pickles the token into `training_args.bin` and uploads whole folders. A push along the way that fails is told,
    and the run goes on.
    """

    args: Any
    state: Any
    hub_model_id: Any
    push_in_progress: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with _without_token(self.args):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find it, and the branch that `hub_revision` names, to which every push goes.

        Raises:
            PushError: it cannot be made: its name, the login, or the connection.
        """
        with _no_repository(self.args):
            super().init_hf_repo(token=token, private=private)  # type: ignore[misc]
            if self.args.hub_revision and self.hub_model_id:  # which is set on the main process
                api = HfApi(token=token or self.args.hub_token)
                api.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model in `output_dir` and upload it, with its card; see the parent. Other files there are not uploaded."""
        trainer: Any = self
        trainer.callback_handler.on_push_begin(self.args, self.state, trainer.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else [*tags]
        tags += [tag for tag in getattr(trainer.model, "model_tags", None) or () if tag not in tags]
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        trainer.create_model_card(model_name=name, **({"tags": tags} if tags else {}), **kwargs)
        trainer._finish_current_push()
        return self._upload(
            folder,
            [*model_files(folder), *listed_files(folder, CARD_FILES)],
            commit_message or "End of training",
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model of a checkpoint; under the strategies `checkpoint` and `all_checkpoints` what a resume needs too."""
        trainer: Any = self
        strategy, source = self.args.hub_strategy, Path(checkpoint_folder)
        if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(self.args, self.state, trainer.control)
        unit = "step" if self.args.save_strategy == SaveStrategy.STEPS else "epoch"
        count = self.state.global_step if unit == "step" else int(self.state.epoch)
        message = f"Training in progress, {unit} {count}"
        model = model_files(source)
        parts: list[tuple[list[str], str | None, str]] = [(model, None, message)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = _LAST if strategy == HubStrategy.CHECKPOINT else source.name
            parts.append((checkpoint_files(source), place, f"{message}, checkpoint"))
        try:
            staged = _stage(source, sorted({name for names, _, _ in parts for name in names}))
        except OSError as error:  # no space for copies, for one
            logger.warning(_FAILED, source.name, reason_of(error))
            return
        jobs = [
            self._upload(staged, names, said, path_in_repo=place, run_as_future=True, revision=self.args.hub_revision)
            for names, place, said in parts
        ]
        _when_done(jobs, staged, source.name)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if under_way else []), *jobs])  # type: ignore[arg-type]

    def _upload(self, folder: Path, names: list[str], message: str, *, token: str | None = None, **options: Any) -> Any:
        return HfApi().upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            allow_patterns=names,
            commit_message=message,
            token=token or self.args.hub_token,
            **options,
        )


def check_repository(args: Any) -> None:
    """Make the repository that a run is to be pushed to, or find it, before anything is loaded.

    Raises:
        PushError: it cannot be made: its name, the login, or the connection.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with _no_repository(args):
        HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True)


@contextmanager
def _no_repository(args: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise PushError(
            f"push_to_hub: no repository {args.hub_model_id or Path(args.output_dir).absolute().name!r} to push to "
            f"({reason_of(error)}); set hub_model_id, log in with `hf auth login`, or leave push_to_hub out"
        ) from error


def reason_of(error: BaseException) -> str:
    """Why a request to the Hub failed, in one line: the error's words, and those of what caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    said = [f"{type(one).__name__}: {' '.join(str(one).split())[:300]}" for one in (chain[0], chain[-1])]
    return ", from ".join(dict.fromkeys(said))


@contextmanager
def _without_token(args: Any) -> Iterator[None]:
    """Settings without the Hub's token, while the Trainer pickles them."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token


def _stage(source: Path, names: list[str]) -> Path:
    """Files of a checkpoint under other names of theirs, which rotation leaves alone."""
    staged = source.parent / _STAGED / source.name
    shutil.rmtree(staged, ignore_errors=True)
    for name in names:
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target)
        except OSError:  # a file system without links
            shutil.copyfile(source / name, target)
    return staged


def _when_done(jobs: list[Future], staged: Path, name: str) -> None:
    """When the last job is done, remove what was staged; of a job that failed, say why."""

    def finish(job: Future) -> None:
        if (error := job.exception()) is not None:
            logger.warning(_FAILED, name, reason_of(error))
        if all(other.done() for other in jobs):
            shutil.rmtree(staged, ignore_errors=True)
            with suppress(OSError):  # another push has files there
                staged.parent.rmdir()

    for job in jobs:
        job.add_done_callback(finish)
