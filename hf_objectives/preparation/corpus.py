"""A corpus from its configuration to a folder of shards with a manifest, and that folder as a dataset."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.utils.tqdm import tqdm

from hf_objectives import __version__
from hf_objectives.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    NothingSupervisedError,
    PreparedDataError,
    WorkerError,
    nearest,
)
from hf_objectives.labels import detect_format
from hf_objectives.preparation.config import CorpusConfig, Source, difference
from hf_objectives.preparation.files import Segment, is_hub_id, plan_file, whole_file
from hf_objectives.preparation.lock import exclusive
from hf_objectives.preparation.manifest import MANIFEST, Manifest
from hf_objectives.preparation.places import Place, local_files
from hf_objectives.preparation.readers import Skipped, read_segment
from hf_objectives.preparation.shards import PROGRESS, Shard
from hf_objectives.preparation.splits import SPLITS
from hf_objectives.preparation.stream import PreparedStream
from hf_objectives.preparation.work import Finished, Work, cut_dataset, segment_key
from hf_objectives.preparation.workers import ENGINES, check_engine
from hf_objectives.types import Row

logger = logging.getLogger(__name__)
_PACKAGES = ("transformers", "tokenizers", "datasets", "pyarrow", "numpy")
_MANY_FILES = 64  # beyond, workers plan them too
# Each source with its files, or the path of its dataset.
Listed = list[tuple[Source, list[str]]]


def prepare_corpus(
    sources: Mapping[str, Any] | Sequence[Source],
    tokenizer: Any,
    output_dir: str | Path,
    settings: CorpusConfig | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Prepare packed rows of some sources in a folder, once however many processes ask for them.

    Shards that were made under the same options, and are whole by their checksum, are kept. So an interrupted run goes
    on, and new files are added. Files that are no longer among the sources lose their shards.

    Args:
        sources: by name, a path, glob or Hub id, a mapping (see `Source`), or a `datasets.Dataset`.
        tokenizer: a fast transformers tokenizer.
        output_dir: the folder; gets `train` and `validation` with shards, and `manifest.json`.
        settings: how documents become rows.
        overwrite: delete a folder that was made under other options, instead of raising an error.

    Raises:
        PreparedDataError: the folder was made under other options (says which), or another process failed at it.
        DataError: a record cannot be used; names source, file and line or row.
        NothingSupervisedError: no token would be trained.
        DiskFullError: no space is left; says how far it got. What was finished is kept.
        WorkerError: a worker process died; what was finished is kept.
        ConfigError: an option is unknown, or Ray is asked for and not installed.
    """
    folder, config = Path(output_dir), settings or CorpusConfig()
    check_engine(config.engine)
    datasets, listed = _list_sources(sources)
    with exclusive(folder, lambda: _progress(folder)):
        with_labels = config.labels == "always" or not _all_texts(listed, datasets)
        policy = {**config.policy(tokenizer), "labels": with_labels}
        if (folder / MANIFEST).exists():
            if overwrite:
                _delete(folder)
            elif different := difference(Manifest.read(folder).policy, policy):
                raise PreparedDataError(
                    f"{folder} was prepared otherwise. {'; '.join(different)}. Choose another folder, or overwrite it"
                )
        work = Work(tokenizer, config, folder, json.dumps(policy, sort_keys=True), with_labels, datasets)
        return _run(
            work,
            _plan(listed, datasets, config),
            Manifest(policy, versions={"hf-objectives": __version__} | {name: version(name) for name in _PACKAGES}),
        )


def load_prepared(
    folder: str | Path,
    split: str = "train",
    *,
    tokenizer: Any = None,
    expect: Mapping[str, Any] | None = None,
    sources: Collection[str] | None = None,
    streaming: bool = False,
    seed: int = 0,
    verify: bool | None = None,
) -> Dataset | PreparedStream:
    """Load the rows of a prepared folder.

    Args:
        folder: from `prepare_corpus`.
        split: "train" or "validation".
        tokenizer: the run's; must be the one that the folder was prepared with, including its chat template.
        expect: options that the run asks for, by their names in the manifest's policy (`max_length`, for example).
        sources: only the rows of these; None for all.
        streaming: return a `PreparedStream`, which shuffles, never ends and copies nothing, instead of a mapped `Dataset`.
        seed: seed of the stream's order.
        verify: check shards against their checksums. None: all of a mapped dataset, now (about a second of one core for a
            gigabyte), and of a stream what is read, when it is read. True: all shards, now. False: none.

    Raises:
        PreparedDataError: the folder has another tokenizer, template or option (says which), is not finished, lacks a
            shard or has one that changed (names the file), or does not have the split or source.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    expected = dict(expect or {})
    if tokenizer is not None:
        policy = CorpusConfig(chat_template=expected.pop("chat_template", None)).policy(tokenizer)
        expected |= {name: policy[name] for name in ("tokenizer", "chat_template")}
    found = {name: manifest.policy.get(name) for name in expected}
    if different := difference(found, expected):
        raise PreparedDataError(f"{folder} was prepared otherwise. {'; '.join(different)}")
    if not manifest.complete:
        raise PreparedDataError(f"{folder} is not finished ({_progress(folder)}); run hf-objectives prepare again")
    chosen, known = manifest.named if sources is None else sources, manifest.named
    for name in chosen:
        if name not in known:
            raise PreparedDataError(
                f"{folder} has no source {name!r}; expected one of {', '.join(known)}{nearest(name, known)}"
            )
    shards = [shard for shard in manifest.shards if shard.split == split and shard.source in chosen]
    if not shards:
        named = f" of {', '.join(sources)}" if sources else ""
        raise PreparedDataError(f"{folder} has no {split} split{named}; prepare it with eval_share above 0")
    checksum = not streaming if verify is None else verify
    with ThreadPoolExecutor() as pool:  # hashlib gives the other threads their turn
        list(pool.map(partial(Shard.check, folder=folder, checksum=checksum), shards))
    file_format = manifest.policy["file_format"]
    if streaming:
        return PreparedStream(folder, shards, file_format, seed=seed, verify=verify is not False)
    files = [str(folder / shard.path) for shard in shards]
    if file_format == "arrow":
        return concatenate_datasets([Dataset.from_file(file) for file in files])
    return load_dataset(file_format, data_files={split: files}, split=split)


def _list_sources(sources: Mapping[str, Any] | Sequence[Source]) -> tuple[dict[str, Dataset], Listed]:
    """Datasets by path, and each source with its files or the path of its dataset."""
    datasets: dict[str, Dataset] = {}
    listed: Listed = []
    if not sources:
        raise ConfigError("no sources; name at least one")
    if not isinstance(sources, Mapping) and not all(isinstance(source, Source) for source in sources):
        raise ConfigError(f"sources is {sources!r}; expected a mapping of names to sources")
    entries = sources.items() if isinstance(sources, Mapping) else [(source.name, source) for source in sources]
    for name, entry in entries:
        if isinstance(entry, Dataset):
            source, paths, dataset = Source(name, "dataset"), [""], entry
        else:
            source = entry if isinstance(entry, Source) else Source.read(name, entry)
            paths = [source.path] if isinstance(source.path, str) else list(source.path)
            on_hub = len(paths) == 1 and is_hub_id(paths[0])
            dataset = Place(paths[0], source.split).load_dataset() if on_hub else None
        if dataset is not None:
            path = f"dataset:{dataset._fingerprint}"
            datasets[path] = dataset
            listed.append((source, [path]))
        else:
            # Links stay: in the Hub's cache what they lead to has no ending.
            files = [str(Path(file).absolute()) for pattern in paths for file in local_files(pattern)]
            listed.append((source, list(dict.fromkeys(files))))
    return datasets, listed


def _plan(listed: Listed, datasets: Mapping[str, Dataset], config: CorpusConfig) -> list[Segment]:
    segments: list[Segment] = []
    files = []
    for source, paths in listed:
        for path in paths:
            if path in datasets:
                segments += cut_dataset(source.name, path, datasets[path], config.shard_bytes)
            else:
                files.append((source.name, path, source.documents, config.shard_bytes))
    many = len(files) > _MANY_FILES
    planned = ENGINES[config.engine](_plan_one, files, config.num_proc) if many else map(_plan_one, files)
    by_file = {(part[0].source, part[0].path): part for part in planned if part}  # workers finish in any order
    return segments + [segment for name, path, *_ in files for segment in by_file.get((name, path), [])]


def _plan_one(file: tuple[str, str, str, int]) -> list[Segment]:
    source, path, documents, shard_bytes = file
    return plan_file(source, path, segment_bytes=shard_bytes, documents=documents)


def _all_texts(listed: Listed, datasets: Mapping[str, Dataset]) -> bool:
    """Whether every source holds plain texts, judged by the first row of each whose format is known."""
    for source, paths in listed:
        for row in (row for path in paths for row in _rows(source, path, datasets)):
            with suppress(DataError):  # broken rows are reported where they are prepared
                if detect_format(row) != "text":
                    return False
                break
    return True


def _rows(source: Source, path: str, datasets: Mapping[str, Dataset]) -> Iterator[Row]:
    if path in datasets:
        yield from datasets[path]
    else:
        for records in read_segment(whole_file(source.name, path, source.documents), skipped=Skipped()):
            yield from records.rows


def _delete(folder: Path) -> None:
    for name in (*SPLITS, PROGRESS):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / MANIFEST).unlink()


def _run(work: Work, segments: list[Segment], manifest: Manifest) -> Manifest:
    folder = work.folder
    (folder / PROGRESS).mkdir(exist_ok=True)
    keys = [segment_key(segment, work.policy) for segment in segments]
    # What another run was content to skip is an error in this one.
    strict = work.config.on_error == "raise"
    kept = {key: done for key in keys if (done := _finished(folder, key)) is not None}
    finished = {key: done for key, done in kept.items() if not (strict and done.left_out)}
    todo = [segment for segment, key in zip(segments, keys, strict=True) if key not in finished]
    if finished:
        logger.info("%d of %d segments are there already", len(finished), len(keys))
    # Another process of the same run may read a finished folder already.
    if todo or not (folder / MANIFEST).exists():
        manifest.write(folder)
    (folder / PROGRESS / "segments").write_text(str(len(segments)))
    try:
        if todo and work.config.engine == "local":
            work.warm_up()
        results = ENGINES[work.config.engine](work, todo, work.config.num_proc)
        for done in tqdm(results, total=len(segments), initial=len(finished), desc="Preparing", unit="shard"):
            finished[done.key] = done
    except (DiskFullError, WorkerError) as error:
        raise type(error)(
            f"{error}; {len(finished)} of {len(segments)} segments are finished and kept, run again to go on"
        ) from error
    manifest.add(finished[key] for key in keys)
    if not any(shard.supervised for shard in manifest.shards):
        raise NothingSupervisedError(f"no token would be trained; {'; '.join(manifest.lines()) or 'no documents'}")
    _remove_stale(folder, manifest, set(keys))
    manifest.complete = True
    manifest.write(folder)
    return manifest


def _finished(folder: Path, key: str) -> Finished | None:
    """The account of a segment whose shards are all as they were written."""
    account = folder / PROGRESS / f"{key}.json"
    if not account.exists():
        return None
    try:
        done = Finished.read(account)
    except ValueError as error:
        logger.warning("%s; its segment is made again", error)
        return None
    damaged = [shard.path for shard in done.shards if not shard.intact(folder)]
    for path in damaged:
        logger.warning("%s fails its checksum and is made again", folder / path)
    return None if damaged else done


def _remove_stale(folder: Path, manifest: Manifest, keys: set[str]) -> None:
    """Remove shards and accounts of files that are gone: a plain reader of the folder would read them too."""
    current = {shard.path for shard in manifest.shards}
    for account in (folder / PROGRESS).glob("*.json"):
        if account.stem not in keys:
            with suppress(ValueError):  # a damaged account names no shard
                for shard in Finished.read(account).shards:
                    if shard.path not in current:
                        (folder / shard.path).unlink(missing_ok=True)
            account.unlink()


def _progress(folder: Path) -> str:
    planned = folder / PROGRESS / "segments"
    total = planned.read_text() if planned.exists() else "?"
    return f"{len(list((folder / PROGRESS).glob('*.json')))} of {total} segments finished"
