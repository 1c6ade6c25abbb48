"""A corpus from its configuration to a folder of shards with a manifest, and that folder as a dataset."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.utils.tqdm import tqdm

from hf_objectives.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    NothingSupervisedError,
    PreparedDataError,
    nearest,
)
from hf_objectives.labels import detect_format
from hf_objectives.preparation.config import CorpusSettings, Source, difference
from hf_objectives.preparation.data_files import is_hub_id
from hf_objectives.preparation.lock import exclusive
from hf_objectives.preparation.manifest import MANIFEST, Manifest, totals
from hf_objectives.preparation.readers import Segment, Skipped, list_files, plan_file, read_segment, whole_file
from hf_objectives.preparation.shards import FORMATS, PROGRESS
from hf_objectives.preparation.stream import PreparedStream
from hf_objectives.preparation.work import SPLITS, Finished, Work, cut_dataset, segment_key
from hf_objectives.preparation.workers import ENGINES

logger = logging.getLogger(__name__)
_PACKAGES = ("hf-objectives", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")


def prepare_corpus(
    sources: Mapping[str, Any] | Sequence[Source],
    tokenizer: Any,
    output_dir: str | Path,
    settings: CorpusSettings | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Prepare packed rows of some sources in a folder, once however many processes ask for them.

    What is there already under the same settings, whole and by its checksum, is kept: a run that was interrupted goes
    on, new files are added, and files that are no longer among the sources lose their shards.

    Args:
        sources: by name, a path, glob or Hub id, a mapping (see `Source`), or a `datasets.Dataset`.
        tokenizer: a fast transformers tokenizer.
        output_dir: the folder; gets `train` and `validation` with shards, and `manifest.json`.
        settings: how documents become rows.
        overwrite: throw away a folder that was made under other settings, instead of the error.

    Raises:
        PreparedDataError: the folder was made under other settings; says which. Or another process failed at it.
        DataError: a record that cannot be used; names source, file and line or row.
        NothingSupervisedError: no token would be trained.
        DiskFullError: no space is left; says how far it got. What was finished is kept.
        WorkerError: a worker process died.
        ConfigError: an unknown setting.
    """
    folder, settings = Path(output_dir), settings or CorpusSettings()
    for name, known in (("engine", ENGINES), ("file_format", FORMATS)):
        value = getattr(settings, name)
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}{nearest(str(value), known)}")
    datasets, named = _resolve(sources)
    with exclusive(folder, lambda: _progress(folder)):
        with_labels = settings.labels == "always" or not _all_texts(named, datasets)
        policy = {**settings.policy(tokenizer), "labels": with_labels}
        _refuse_other(folder, policy, overwrite)
        work = Work(tokenizer, settings, folder, json.dumps(policy, sort_keys=True), with_labels, datasets)
        manifest = _run(work, _plan(named, datasets, settings), Manifest(policy, versions=_versions()))
    return manifest


def load_prepared(
    folder: str | Path,
    split: str = "train",
    *,
    tokenizer: Any = None,
    expect: Mapping[str, Any] | None = None,
    sources: Collection[str] | None = None,
    streaming: bool = False,
    seed: int = 0,
) -> Dataset | PreparedStream:
    """The rows of a prepared folder: a `datasets.Dataset`, or a stream without an end.

    Args:
        folder: from `prepare_corpus`.
        split: "train" or "validation".
        tokenizer: the run's; must be the one that the folder was prepared with, its chat template included.
        expect: settings that the run asks for, by their names in the manifest's policy (`max_length`, say).
        sources: only the rows of these; None for all.
        streaming: a `PreparedStream`, which shuffles, never ends and copies nothing, instead of a mapped `Dataset`.
        seed: of the stream's order.

    Raises:
        PreparedDataError: another tokenizer, template or setting than asked for (says which), an unfinished folder, a
            shard that is missing or cut off, or a split or source that the folder does not have.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    expected = dict(expect or {})
    if tokenizer is not None:
        of_run = CorpusSettings(chat_template=expected.pop("chat_template", None)).policy(tokenizer)
        expected |= {name: of_run[name] for name in ("tokenizer", "chat_template")}
    found = {name: manifest.policy.get(name) for name in expected}
    if found != expected:
        raise PreparedDataError(f"{folder} was prepared otherwise. " + "; ".join(difference(found, expected)))
    if not manifest.complete:
        raise PreparedDataError(f"{folder} is not finished ({_progress(folder)}); run hf-objectives prepare again")
    for name in sources or ():
        if name not in manifest.sources:
            raise PreparedDataError(
                f"{folder} has no source {name!r}; expected one of {', '.join(manifest.sources)}"
                f"{nearest(name, manifest.sources)}"
            )
    shards = [s for s in manifest.shards if s.split == split and (sources is None or s.source in sources)]
    if not shards:
        of = "" if sources is None else f" of {', '.join(sources)}"
        raise PreparedDataError(f"{folder} has no {split} split{of}; prepare it with eval_share above 0")
    for shard in shards:
        if not shard.intact(folder, checksum=False):
            raise PreparedDataError(f"{folder / shard.path} is missing or cut off; run hf-objectives prepare again")
    kind = manifest.policy["file_format"]
    if streaming:
        return PreparedStream(folder, shards, kind, seed=seed)
    files = [str(folder / shard.path) for shard in shards]
    if kind == "arrow":
        return concatenate_datasets([Dataset.from_file(file) for file in files])
    return load_dataset(kind, data_files={split: files}, split=split)


def _resolve(
    sources: Mapping[str, Any] | Sequence[Source],
) -> tuple[dict[str, Dataset], list[tuple[Source, list[str]]]]:
    """Datasets by path, and each source with its files or the path of its dataset."""
    datasets: dict[str, Dataset] = {}
    named: list[tuple[Source, list[str]]] = []
    if not sources:
        raise ConfigError("no sources; name at least one")
    given = sources.items() if isinstance(sources, Mapping) else [(source.name, source) for source in sources]
    for name, one in given:
        if isinstance(one, Dataset):
            source, path = Source(name, "dataset"), f"dataset:{one._fingerprint}"
            datasets[path] = one
            named.append((source, [path]))
            continue
        source = one if isinstance(one, Source) else Source.read(name, one)
        paths = [source.path] if isinstance(source.path, str) else list(source.path)
        if len(paths) == 1 and is_hub_id(paths[0]):
            one = load_dataset(paths[0], split=source.split)
            path = f"dataset:{one._fingerprint}"
            datasets[path] = one
            named.append((source, [path]))
        else:
            files = [str(Path(file).resolve()) for pattern in paths for file in list_files(pattern)]
            named.append((source, list(dict.fromkeys(files))))
    return datasets, named


def _plan(
    named: Iterable[tuple[Source, list[str]]], datasets: Mapping[str, Dataset], settings: CorpusSettings
) -> list[Segment]:
    segments: list[Segment] = []
    files = []
    for source, paths in named:
        for path in paths:
            if path in datasets:
                segments += cut_dataset(source.name, path, datasets[path], settings.shard_bytes)
            else:
                files.append((source.name, path, source.documents, settings.shard_bytes))
    planned = (
        ENGINES[settings.engine](_plan_one, files, settings.num_proc) if len(files) > 64 else map(_plan_one, files)
    )
    # Whatever order the engine finished them in.
    by_file = {(part[0].source, part[0].path): part for part in planned if part}
    return segments + [segment for name, path, *_ in files for segment in by_file.get((name, path), [])]


def _plan_one(file: tuple[str, str, str, int]) -> list[Segment]:
    source, path, documents, shard_bytes = file
    return plan_file(source, path, segment_bytes=shard_bytes, documents=documents)


def _all_texts(named: Iterable[tuple[Source, list[str]]], datasets: Mapping[str, Dataset]) -> bool:
    """Whether every source holds plain texts, by the first row of each that says what it is."""
    for source, paths in named:
        rows = (row for path in paths for row in _rows(source, path, datasets))
        if next((kind for row in rows if (kind := _kind(row))), "text") != "text":
            return False
    return True


def _rows(source: Source, path: str, datasets: Mapping[str, Dataset]) -> Iterator[Mapping]:
    if path in datasets:
        yield from datasets[path]
    else:  # broken records are reported where they are prepared
        for records in read_segment(whole_file(source.name, path, source.documents), skipped=Skipped()):
            yield from records.rows


def _kind(row: Mapping) -> str | None:
    try:
        return detect_format(row)
    except DataError:
        return None


def _refuse_other(folder: Path, policy: Mapping[str, Any], overwrite: bool) -> None:
    if not (folder / MANIFEST).exists():
        return
    if overwrite:
        found = None
    else:
        found = Manifest.read(folder).policy
        if different := difference(found, policy):
            raise PreparedDataError(
                f"{folder} was prepared otherwise. {'; '.join(different)}. Choose another folder, or overwrite it"
            )
    if found is None:
        for name in (*SPLITS, PROGRESS):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / MANIFEST).unlink()


def _run(work: Work, segments: list[Segment], manifest: Manifest) -> Manifest:
    folder = work.folder
    (folder / PROGRESS).mkdir(exist_ok=True)
    keys = [segment_key(segment, work.policy) for segment in segments]
    # What another run was content to skip is an error in this one.
    strict = work.settings.on_error == "raise"
    found = {key: done for key in keys if (done := _finished(folder, key)) is not None}
    finished = {key: done for key, done in found.items() if not (strict and done.left_out)}
    todo = [segment for segment, key in zip(segments, keys, strict=True) if key not in finished]
    if finished:
        logger.info("%d of %d segments are there already", len(finished), len(keys))
    manifest.write(folder)
    (folder / PROGRESS / "segments").write_text(str(len(segments)))
    try:
        if todo and work.settings.engine == "local":
            work.warm_up()
        results = ENGINES[work.settings.engine](work, todo, work.settings.num_proc)
        for done in tqdm(results, total=len(segments), initial=len(finished), desc="Preparing", unit="shard"):
            finished[done.key] = done
    except DiskFullError as error:
        raise DiskFullError(
            f"{error}; {len(finished)} of {len(segments)} segments are finished and kept, run again to go on"
        ) from error
    manifest = totals((finished[key] for key in keys), manifest)
    if not any(shard.supervised for shard in manifest.shards):
        raise NothingSupervisedError(f"no token would be trained; {'; '.join(manifest.lines()) or 'no documents'}")
    _remove_stale(folder, manifest, set(keys))
    manifest.complete = True
    manifest.write(folder)
    return manifest


def _finished(folder: Path, key: str) -> Finished | None:
    """The account of a segment whose shards are all what was written."""
    account = folder / PROGRESS / f"{key}.json"
    if not account.exists():
        return None
    done = Finished.from_json(account.read_bytes())
    damaged = [shard.path for shard in done.shards if not shard.intact(folder)]
    for path in damaged:
        logger.warning("%s fails its checksum and is made again", folder / path)
    return None if damaged else done


def _remove_stale(folder: Path, manifest: Manifest, keys: set[str]) -> None:
    """Shards and accounts of what is no longer among the sources: a plain reader of the folder would read them too."""
    mine = {shard.path for shard in manifest.shards}
    for account in (folder / PROGRESS).glob("*.json"):
        if account.stem not in keys:
            for shard in Finished.from_json(account.read_bytes()).shards:
                if shard.path not in mine:
                    (folder / shard.path).unlink(missing_ok=True)
            account.unlink()


def _progress(folder: Path) -> str:
    progress = folder / PROGRESS
    planned = progress / "segments"
    total = planned.read_text() if planned.exists() else "?"
    return f"{len(list(progress.glob('*.json')))} of {total} segments finished"


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}
