"""A dataset on the Hub -> a JSONL file here, with its commit and licence. Runs in a child process; never imports torch.

`datasets` streams the rows, so that no more is fetched than is needed. Code of the repository is never run, and files that
its card names outside of it are not read.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import orjson

from qlora_core.errors import DatasetError
from qlora_core.hub import hub_errors, reason

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

PREFIX = "hub:"
FORM = "hub:OWNER/NAME[:CONFIG[:SPLIT]][@REVISION]"
# Formats whose rows are text and numbers, and their file endings. Others run decoders on what they read: webdataset's even
# import torch.
READERS = {
    "parquet": (".parquet", ".geoparquet", ".gpq"),
    "json": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "arrow": (".arrow",),
    "text": (".txt",),
}
READABLE = "Parquet, JSON Lines, JSON, CSV, TSV, Arrow, text"
ROWS_A_REPORT = 100
_NAME = r"[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class HubDataset:
    """Which rows are meant. None: the default configuration, the split `train` or the only one, the newest commit."""

    repo_id: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """Read `hub:OWNER/NAME[:CONFIG[:SPLIT]][@REVISION]`, with or without `hub:`, or the address of the dataset's page."""
        plain = text.strip()
        if re.match(r"https?://", plain):
            return _of_page(plain)
        where, at, revision = plain.removeprefix(PREFIX).partition("@")
        repo_id, *parts = where.split(":", 2)
        if at and not revision:
            raise DatasetError(
                f"dataset {text!r}: nothing follows '@'; name a branch, tag or commit there, or leave '@' out"
            )
        config, split = [part or None for part in (*parts, "", "")[:2]]
        return _checked(cls(repo_id.strip().removeprefix("datasets/"), config, split, revision or None), text)

    def __str__(self) -> str:
        parts = [self.repo_id]
        if self.config or self.split:
            parts.append(self.config or "")
        if self.split:
            parts.append(self.split)
        return PREFIX + ":".join(parts) + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Fetched:
    """What lies at `path`. `source` names the commit, configuration and split that were taken; `truncated`: the limit was
    reached before the end; `left_out_columns` hold images, sound or other bytes, which are not text."""

    path: Path
    source: HubDataset
    rows: int
    license: str | None
    truncated: bool
    left_out_columns: tuple[str, ...]

    def origin(self) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "license": self.license,
            "rows": self.rows,
            "truncated": self.truncated,
            "left_out_columns": list(self.left_out_columns),
        }


def fetch(
    source: HubDataset,
    folder: Path,
    *,
    token: str | None,
    limit: int | None,
    max_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> Fetched:
    """Write the rows into `folder`, one JSON object a line with all columns but those of bytes.

    `progress` gets the number of rows so far and may raise to cancel: nothing is left behind then. Raises DatasetError.
    """
    info = _look_up(source, token)
    reading = _Reading(source, str(info.sha), token)
    builder = reading.builder()
    split = reading.split(builder)
    stream, left_out = reading.stream(builder, split)
    taken = replace(source, config=builder.config.name, split=split, revision=info.sha)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_file_name(taken, None)}.{os.getpid()}.partial"
    try:
        rows, truncated = _write(partial, reading.rows(stream), source, limit, max_bytes, progress)
        path = folder / _file_name(taken, limit if truncated else None)
        fetched = Fetched(path, taken, rows, _license(info), truncated, left_out)
        origin_path(path).unlink(missing_ok=True)  # that of rows which are about to be replaced
        partial.rename(path)
        origin_path(path).write_bytes(orjson.dumps(fetched.origin()))
    finally:
        partial.unlink(missing_ok=True)
    return fetched


def origin_path(path: Path) -> Path:
    """Beside a fetched file, where its rows come from; for whoever has the file alone."""
    return path.with_suffix(".origin.json")


def origin_of(path: Path) -> dict[str, Any]:
    """What `fetch` knew of this file; empty for a file of another origin."""
    try:
        return orjson.loads(origin_path(path).read_bytes())
    except (OSError, ValueError):
        return {}


def _of_page(address: str) -> HubDataset:
    """https://huggingface.co/datasets/OWNER/NAME, also with /tree/REVISION or /viewer/CONFIG/SPLIT behind it."""
    url = urlsplit(address)
    hosts = {"huggingface.co", "hf.co", urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
    kind, *parts = [unquote(part) for part in url.path.strip("/").split("/")]
    if url.netloc not in hosts or kind != "datasets" or len(parts) < 2:
        raise DatasetError(
            f"dataset {address!r}: is no page of a dataset on the Hub; https://huggingface.co/datasets/… is one"
        )
    repo_id, (what, *rest) = "/".join(parts[:2]), parts[2:] or [""]
    if what == "viewer":
        config, split = (*rest, None, None)[:2]
        return _checked(HubDataset(repo_id, config, split, None), address)
    revision = rest[0] if what in ("tree", "blob", "resolve") and rest else None
    return _checked(HubDataset(repo_id, None, None, revision), address)


def _checked(source: HubDataset, text: str) -> HubDataset:
    problems = []
    if not re.fullmatch(f"{_NAME}/{_NAME}", source.repo_id, re.ASCII) or ".." in source.repo_id:
        problems.append(
            f"{source.repo_id!r} is no name of a dataset on the Hub; write {FORM}, as in hub:tatsu-lab/alpaca"
        )
    if source.config and re.search(r"[<>:/\\|?*]", source.config):
        problems.append(f"{source.config!r} is no name of a configuration; its page lists those there are as subsets")
    if source.split and not re.fullmatch(r"\w+(\.\w+)*", source.split):
        problems.append(
            f"{source.split!r} is no name of a split; name one, such as train, and take fewer rows by the limit"
        )
    if source.revision and (not re.fullmatch(r"[\w./+-]+", source.revision) or ".." in source.revision):
        problems.append(f"{source.revision!r} is no revision; name a branch, a tag or a commit")
    if problems:
        raise DatasetError(*(f"dataset {text!r}: {problem}" for problem in problems))
    return source


def _look_up(source: HubDataset, token: str | None) -> "DatasetInfo":
    """The commit, card and file names; raises DatasetError where the token does not reach the contents either."""
    from huggingface_hub import HfApi

    # Without a token, False: the one that someone logged in with on this machine is not this person's.
    api = HfApi(token=token or False)
    with hub_errors(f"dataset {str(source)!r}", token, error=DatasetError):
        info = api.dataset_info(source.repo_id, revision=source.revision)
        if info.gated:
            api.auth_check(source.repo_id, repo_type="dataset")
    script = f"{source.repo_id.partition('/')[2]}.py"
    if any(file.rfilename == script for file in info.siblings or ()):
        raise DatasetError(
            f"dataset {str(source)!r}: needs its own program {script}, which is never run here; the Hub keeps a copy as "
            f"Parquet of many such datasets: try {replace(source, config=None, revision='refs/convert/parquet')}"
        )
    return info


def _license(info: "DatasetInfo") -> str | None:
    named = info.card_data.get("license") if info.card_data else None
    names = [named] if isinstance(named, str) else list(named or ())
    names = names or [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return ", ".join(map(str, names)) or None


@dataclass(frozen=True)
class _Reading:
    """The rows of one commit, read by `datasets`, whose many kinds of errors become DatasetError here."""

    source: HubDataset  # as it was asked for, for messages
    commit: str
    token: str | None

    def builder(self) -> Any:
        names: list[str] = []
        # Without "hf://", a folder of that name here would be taken instead.
        place = f"hf://datasets/{self.source.repo_id}"
        asked: dict[str, Any] = {"revision": self.commit, "token": self.token or False}
        try:
            builder = _datasets().load_dataset_builder(place, self.source.config, **asked)
        except Exception as error:
            if isinstance(error, ValueError):  # also where no or no known configuration is named
                names = self._configurations(place, asked)
            if len(names) > 1 and not self.source.config:
                raise self._problem(
                    f"has several configurations; name one of {', '.join(names)}, as in {FORM}"
                ) from None
            if names and self.source.config and self.source.config not in names:
                listed = ", ".join(names)
                raise self._problem(f"has no configuration {self.source.config!r}; there are: {listed}") from None
            raise self._unreadable(error) from None
        self._check(builder)
        return builder

    def _configurations(self, place: str, asked: dict[str, Any]) -> list[str]:
        try:
            return _datasets().get_dataset_config_names(place, **asked)
        except Exception:  # the error at hand says more
            return []

    def _check(self, builder: Any) -> None:
        """That the files are of the one format in which `datasets` is about to read all of them."""
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in READERS:
            raise self._problem(f"its files are of the kind {kind!r}, which is not read here; readable are {READABLE}")
        if self.source.config and builder.config.name != self.source.config:
            raise self._problem(f"has no configuration {self.source.config!r}; there is: {builder.config.name}")
        names = [file.rpartition("/")[2] for files in builder.config.data_files.values() for file in files]
        strange = [name for name in names if not {*Path(name.lower()).suffixes} & {*READERS[kind], ".zip"}]
        if strange:
            raise self._problem(
                f"{strange[0]} of the configuration {builder.config.name!r} is no {kind} file, and `datasets` reads all of a "
                "repository in the format of its first configuration; take that one, or fetch the file from its page"
            )

    def split(self, builder: Any) -> str:
        there = [str(name) for name in builder.config.data_files]
        if self.source.split:
            if self.source.split in there:
                return self.source.split
            raise self._problem(f"has no split {self.source.split!r}; there are: {', '.join(there)}")
        if "train" in there or len(there) == 1:
            return "train" if "train" in there else there[0]
        raise self._problem(f"has no split 'train'; name one of {', '.join(there)}, as in {FORM}")

    def stream(self, builder: Any, split: str) -> tuple[Any, tuple[str, ...]]:
        """The split's rows without the columns that are not text, and the names of those."""
        try:
            stream = builder.as_streaming_dataset(split=split)
            features = stream.features or {}
            left_out = tuple(name for name, feature in features.items() if not _is_text(feature))
            kept = [name for name in features if name not in left_out]
            if left_out and kept:
                if hasattr(builder.config, "columns"):  # Parquet: the others are then not even fetched
                    builder.config.columns = kept
                    stream = builder.as_streaming_dataset(split=split)
                stream = stream.select_columns(kept)
        except Exception as error:
            raise self._unreadable(error) from None
        if left_out and not kept:
            raise self._problem(f"no column of it is text; it has {', '.join(left_out)}")
        return stream, left_out

    def rows(self, stream: Any) -> Iterator[dict[str, Any]]:
        """An error while a row is used is not caught here: only what reading it raises."""
        rows, number = iter(stream if stream.features else _decoded(stream.with_format("arrow"))), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error, f"after row {number:,} " if number else "") from None
            number += 1
            yield row

    def _unreadable(self, error: Exception, where: str = "") -> DatasetError:
        from datasets.exceptions import DataFilesNotFoundError
        from httpx2 import HTTPError

        text = reason(error, self.token)
        if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
            return self._problem(f"{where}{text}")
        if isinstance(error, DataFilesNotFoundError) or type(error).__name__ == "EmptyDatasetError":
            return self._problem(f"has no data files of a kind that is read here: {READABLE}")
        if "Data files don't belong to" in str(error):
            return self._problem("its card names data files outside of the repository, which are not read")
        if isinstance(error, (TypeError, ValueError)) and "cast" in str(error).lower():
            hint = (
                "its files or rows differ in their columns; name a configuration or a revision in which they are alike"
            )
            return self._problem(f"{where}{hint} ({text})")
        hint = "its page shows whether the Hub can read it; if not, download its files and upload one here"
        return self._problem(f"{where}cannot be read ({type(error).__name__}: {text}); {hint}")

    def _problem(self, text: str) -> DatasetError:
        return DatasetError(f"dataset {str(self.source)!r}: {text}")


def _datasets() -> Any:
    """The library as it is used here: without torch, statistics or the viewer's server, which none of this needs, and
    without waiting twenty times for a broken connection: the client below it has already tried six times."""
    import datasets
    import huggingface_hub

    datasets.config.TORCH_AVAILABLE = False
    datasets.config.USE_PARQUET_EXPORT = False
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):  # what matters is raised
        library.logging.set_verbosity(library.logging.CRITICAL)
    return datasets


def _decoded(tables: Any) -> Iterator[dict[str, Any]]:
    """Rows of one-row tables. Where `datasets` knows no columns beforehand, as for a JSON array, it leaves values of mixed
    types as JSON text in the rows; the tables tell which those are."""
    from datasets import Features

    schema, features = None, Features()
    for table in tables:
        if table.schema != schema:
            schema, features = table.schema, Features.from_arrow_schema(table.schema)
        yield features.decode_example(table.to_pylist()[0])


def _is_text(feature: Any) -> bool:
    """Whether the values can be written as JSON: text, numbers, times, and lists and objects of them."""
    from datasets import features

    if isinstance(feature, dict):
        return all(map(_is_text, feature.values()))
    if isinstance(feature, list):
        return all(map(_is_text, feature))
    if isinstance(feature, (features.List, features.LargeList)):
        return _is_text(feature.feature)
    if isinstance(feature, features.Value):
        return "binary" not in feature.dtype
    plain = (features.ClassLabel, features.Json, features.Translation, features.TranslationVariableLanguages)
    arrays = (features.Array2D, features.Array3D, features.Array4D, features.Array5D)
    return isinstance(feature, (*plain, *arrays))


def _write(
    path: Path,
    rows: Iterator[dict[str, Any]],
    source: HubDataset,
    limit: int | None,
    max_bytes: int,
    progress: Callable[[int], None] | None,
) -> tuple[int, bool]:
    """The number of rows written and whether there are more; raises DatasetError above `max_bytes` and without any row."""
    number, written, truncated = 0, 0, False
    with path.open("wb") as file:
        for row in rows:
            if number == limit:
                truncated = True
                break
            try:
                line = orjson.dumps(
                    row, default=_json_value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
                )
            except TypeError as error:
                raise DatasetError(
                    f"dataset {str(source)!r}: row {number + 1} cannot be written as JSON ({error})"
                ) from None
            written += len(line)
            if written > max_bytes:
                raise DatasetError(
                    f"dataset {str(source)!r}: is longer than the {max_bytes:,} bytes that may be written; its first "
                    f"{number:,} rows fit: set a limit of that many rows, or choose a smaller split"
                )
            file.write(line)
            number += 1
            if progress and number % ROWS_A_REPORT == 0:
                progress(number)
        file.flush()
        os.fsync(file.fileno())
    if not number:
        raise DatasetError(f"dataset {str(source)!r}: has no rows; choose another split or revision")
    if progress:
        progress(number)
    return number, truncated


def _json_value(value: Any) -> Any:
    """What orjson leaves to us: times of pandas, durations (in seconds) and decimals, whose digits are kept as text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    if type(value).__name__ == "Decimal":
        return str(value)
    raise TypeError(f"a value of the type {type(value).__name__}")


def _file_name(source: HubDataset, limit: int | None) -> str:
    """Another revision, or more rows, is another file: nobody's rows change under them."""
    parts = [
        *source.repo_id.split("/"),
        source.config or "default",
        source.split or "train",
        (source.revision or "")[:8],
    ]
    parts += [f"first{limit}"] if limit else []
    name = "--".join(re.sub(r"[^A-Za-z0-9_.-]", "_", part) for part in parts)
    # File systems allow 255 bytes, of which the partial file's ending needs some.
    return f"{name}.jsonl" if len(name) <= 200 else f"{name[:180]}-{sha256(name.encode()).hexdigest()[:16]}.jsonl"
