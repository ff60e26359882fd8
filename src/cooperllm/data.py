"""Labelled texts in one place: files, hub data sets and the embedded generator; splits; partitions over devices.

The cloud reads the training part of the public source. The private source gives the devices' training part and the validation and test
parts on which every arm is tuned and judged.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets.exceptions import DatasetsError
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner
from jaxtyping import Int64

from cooperllm import reviews
from cooperllm.algorithm import noise
from cooperllm.config import NO_TEXT, UNLABELLED, DataConfig, FederationConfig, Partition, SourceConfig
from cooperllm.errors import ConfigError

PARTS = ("train", "validation", "test")
LABEL_NOISE = (1 << 61) + 4
"""Noise index that chooses which public labels are replaced; the next one draws what by."""

STREAM_BUFFER = 10_000
"""Examples of a stream among which the next one is drawn."""

GENERATED_SIZES = {"train": 2400, "validation": 400, "test": 800}
READERS = {
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
    ".csv": pyarrow.csv.read_csv,
    ".parquet": pyarrow.parquet.read_table,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Labelled texts.

    Attributes:
        texts: First or only texts.
        second_texts: Second texts of pairs, or None.
        labels: Class of each text, from 0; -1 where it has none.
        completions: For next tokens: what is to be said after each text, or None.
        groups: Value of the partition column of each text; empty where none was asked for.
    """

    texts: tuple[str, ...]
    second_texts: tuple[str, ...] | None
    labels: tuple[int, ...]
    completions: tuple[str, ...] | None = None
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Texts":
        """Returns chosen texts in the given order."""
        return Texts(
            texts=tuple(self.texts[index] for index in indices),
            second_texts=None if self.second_texts is None else tuple(self.second_texts[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
            completions=None if self.completions is None else tuple(self.completions[index] for index in indices),
            groups=tuple(self.groups[index] for index in indices) if self.groups else (),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a run learns and is judged on.

    Attributes:
        label_names: Names of the classes.
        public: The cloud's texts.
        private: The devices' texts.
        validation: Texts for tuning.
        test: Texts for judging.
        notices: Sentences a user should read: nothing is wrong, but it may surprise.
    """

    label_names: tuple[str, ...]
    public: Texts
    private: Texts
    validation: Texts
    test: Texts
    notices: tuple[str, ...]


def load(config: DataConfig, federation: FederationConfig, seed: int) -> Task:
    """Reads both sources and brings their labels together.

    Args:
        config: Sources and sizes.
        federation: Says which column the partition needs.
        seed: Chooses examples where a source is larger than asked for, and splits single files.

    Returns:
        The task.

    Raises:
        ConfigError: If a source, a column or a label is missing or does not fit.

    Example:
        >>> task = load(DataConfig(num_test=10), FederationConfig(), 0)
        >>> len(task.test), task.label_names
        (10, ('negative', 'positive'))
    """
    private = _read(config.private, "private", federation.partition_column, seed)
    public = _read(config.public, "public", None, seed)
    names = _label_names(private, config.private.label_column)
    parts = {part: _texts(private, part, config.private, names, federation.partition_column) for part in PARTS}
    parts["train"] = _selected(parts["train"], config.private, names, seed)
    cloud = _relabelled(
        _selected(_texts(public, "train", config.public, names, None), config.public, names, seed), config.public, names, seed
    )
    return Task(
        label_names=names,
        public=cloud,
        private=parts["train"],
        validation=_at_most(parts["validation"], config.num_validation, seed),
        test=_at_most(parts["test"], config.num_test, seed),
        notices=_notices(cloud, parts["train"], names),
    )


def partition(private: Texts, federation: FederationConfig, seed: int) -> list[Int64[np.ndarray, "size"]]:
    """Spreads private texts over devices, with the partitioners of flwr-datasets.

    Args:
        private: The devices' texts.
        federation: Number of devices and kind of partition.
        seed: Decides who gets what.

    Returns:
        Indices into `private`, one array per device, each sorted and non-empty.

    Raises:
        ConfigError: If a device would get nothing.

    Example:
        >>> texts = Texts(texts=("a", "b", "c", "d"), second_texts=None, labels=(0, 1, 0, 1))
        >>> shards = partition(texts, FederationConfig(num_devices=2, num_edges=1, devices_per_round=1, partition=Partition.IID), 0)
        >>> sorted(int(index) for shard in shards for index in shard)
        [0, 1, 2, 3]
    """
    count = federation.num_devices
    if len(private) < count:
        raise ConfigError(f"federation.num_devices: {count} devices for {len(private)} private examples; every device needs at least one")
    columns: dict[str, list[Any]] = {"index": list(range(len(private))), "label": list(private.labels)}
    if private.groups:
        columns["group"] = list(private.groups)
    table = datasets.Dataset.from_dict(columns)
    # The partitioners seed a generator of their own with 32 bits and leave global state alone.
    small_seed = noise.derive(seed, 1) % (1 << 32)
    if federation.partition is Partition.DIRICHLET and UNLABELLED in private.labels:
        raise ConfigError("federation.partition: found dirichlet and texts without labels, expected iid or column; --partition iid")
    if federation.partition is Partition.DIRICHLET:
        partitioner: Any = DirichletPartitioner(
            num_partitions=count, partition_by="label", alpha=federation.dirichlet_alpha, min_partition_size=1, seed=small_seed
        )
    elif federation.partition is Partition.IID:
        table = table.select(noise.permutation(seed, 1, len(private)))
        partitioner = IidPartitioner(num_partitions=count)
    else:
        partitioner = NaturalIdPartitioner(partition_by="group")
    partitioner.dataset = table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it draws again when a device is left empty, and fails if that does not help
            found = int(partitioner.num_partitions)
            shards = [np.sort(np.array(partitioner.load_partition(device)["index"], np.int64)) for device in range(found)]
    except ValueError as error:
        raise ConfigError(
            f"federation.dirichlet_alpha: {federation.dirichlet_alpha} leaves one of {count} devices without examples; "
            "use fewer devices or a larger alpha"
        ) from error
    if found != count:
        raise ConfigError(
            f"federation.num_devices: found {count}, expected {found}, the number of different values in column "
            f"{federation.partition_column!r}"
        )
    return shards


def _read(source: SourceConfig, side: str, group_column: str | None, seed: int) -> dict[str, Any]:
    """Reads the parts of a source as tables, plus "label_names" where the source names its labels."""
    if source.name == NO_TEXT:
        columns = filter(None, (source.text_column, source.second_text_column, source.label_column, source.completion_column))
        return {"train": pa.table(dict.fromkeys(columns, pa.array([], pa.string())))}
    if source.name == "generated":
        return _generated(source, side, seed)
    path = Path(source.name)
    if path.is_dir():
        files = {part: file for part in PARTS for suffix in READERS if (file := path / f"{part}{suffix}").is_file()}
        if "train" not in files:
            raise ConfigError(f"{side} data: {path} has no train file; expected train.jsonl, train.json, train.csv or train.parquet")
        parts: dict[str, Any] = {part: _read_file(file, side) for part, file in files.items()}
        info = path / "info.json"
        if info.is_file():
            parts["label_names"] = json.loads(info.read_text(encoding="utf8")).get("label_names")
    elif path.suffix in READERS:
        parts = {"train": _read_file(path, side)}
    else:
        parts = _read_hub(source, side, seed)
    _require_columns(source, side, parts, group_column)
    return _split(parts, seed) if side == "private" else parts


def _read_file(path: Path, side: str) -> Any:
    if not path.is_file():
        raise ConfigError(
            f"{side} data: {path} does not exist; expected a .jsonl, .json, .csv or .parquet file or a directory of such files"
        )
    try:
        return READERS[path.suffix](path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{side} data: {path} could not be read as {path.suffix[1:]}: {error}") from error


def _read_hub(source: SourceConfig, side: str, seed: int) -> dict[str, Any]:
    try:
        loaded: Any = datasets.load_dataset(source.name, streaming=source.streams)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"{side} data: {source.name!r} is not a file, not a directory, and could not be loaded from the hub "
            f"({str(error).splitlines()[0]}); expected 'generated', a path, or a data set that this machine reaches"
        ) from error
    if "train" not in loaded:
        raise ConfigError(f"{side} data: {source.name!r} has parts {sorted(loaded)}, expected one named 'train'")
    parts: dict[str, Any] = {part: _table(loaded[part], source, seed) for part in PARTS if part in loaded}
    feature = (loaded["train"].features or {}).get(source.label_column)
    if isinstance(feature, datasets.ClassLabel):
        parts["label_names"] = feature.names
    return parts


def _table(part: Any, source: SourceConfig, seed: int) -> Any:
    """A part of a data set on the hub: all of it, or what is read of a stream whose next examples change places."""
    if not source.streams:
        return part.data.table
    return pa.Table.from_pylist(list(part.shuffle(seed=seed, buffer_size=STREAM_BUFFER).take(source.max_examples)))


def _generated(source: SourceConfig, side: str, seed: int) -> dict[str, Any]:
    domains = source.domains or (reviews.PUBLIC_DOMAINS if side == "public" else reviews.PRIVATE_DOMAINS)
    parts: dict[str, Any] = {"label_names": list(reviews.LABEL_NAMES)}
    for index, part in enumerate(PARTS):
        count = source.max_examples if part == "train" and source.max_examples else GENERATED_SIZES[part]
        found = reviews.generate(domains, count, noise.derive(seed, 16 * (side == "public") + index))
        rows = [{"text": review.text, "label": review.label, "domain": review.domain} for review in found]
        parts[part] = pa.Table.from_pylist(rows)
    return parts


def _require_columns(source: SourceConfig, side: str, parts: dict[str, Any], group_column: str | None) -> None:
    wanted = [source.text_column, source.label_column, source.second_text_column, source.completion_column, group_column]
    for part in PARTS:
        names = parts[part].column_names if part in parts else wanted
        for column in wanted:
            if column is not None and column not in names:
                raise ConfigError(f"{side} data: {source.name} ({part}) has columns {names}, expected one named {column!r}")


def _split(parts: dict[str, Any], seed: int) -> dict[str, Any]:
    """Carves a tenth of the training part for each part that is missing."""
    for position, part in enumerate(PARTS[1:]):
        if part not in parts:
            whole = parts["train"]
            order = noise.permutation(noise.derive(seed, 2 + position), 0, whole.num_rows)
            tenth = max(1, whole.num_rows // 10)
            parts[part], parts["train"] = whole.take(order[:tenth]), whole.take(np.sort(order[tenth:]))
    return parts


def _label_names(parts: dict[str, Any], column: str | None) -> tuple[str, ...]:
    if column is None:
        return ()
    if parts.get("label_names"):
        return tuple(map(str, parts["label_names"]))
    values = {value for part in PARTS for value in parts[part].column(column).to_pylist()}
    if all(isinstance(value, int) for value in values):
        return tuple(str(value) for value in range(max(values) + 1))
    return tuple(sorted(map(str, values)))


def _texts(parts: dict[str, Any], part: str, source: SourceConfig, names: Sequence[str], group_column: str | None) -> Texts:
    table = parts[part]
    return Texts(
        texts=_strings(table, source.text_column),
        second_texts=None if source.second_text_column is None else _strings(table, source.second_text_column),
        labels=(UNLABELLED,) * table.num_rows
        if source.label_column is None
        else tuple(_label(value, names, source, part) for value in table.column(source.label_column).to_pylist()),
        completions=None if source.completion_column is None else _completions(table, source, part),
        groups=() if group_column is None else _strings(table, group_column),
    )


def _completions(table: Any, source: SourceConfig, part: str) -> tuple[str, ...]:
    assert source.completion_column is not None, "called where completions were asked for"
    values = table.column(source.completion_column).to_pylist()
    empty = [number for number, value in enumerate(values) if value is None or not str(value).strip()]
    if empty:
        raise ConfigError(
            f"{source.name} ({part}): {len(empty)} of {len(values)} completions in column {source.completion_column!r} are empty, first "
            f"that in row {empty[0] + 1}; fill them in or leave these rows out"
        )
    return tuple(map(str, values))


def _strings(table: Any, column: str) -> tuple[str, ...]:
    return tuple(map(str, table.column(column).to_pylist()))


def _label(value: object, names: Sequence[str], source: SourceConfig, part: str) -> int:
    if isinstance(value, int) and 0 <= value < len(names):
        return value
    if str(value) in names:
        return names.index(str(value))
    raise ConfigError(f"{source.name} ({part}): label {value!r} found, expected one of {list(names)} or its number from 0")


def _selected(texts: Texts, source: SourceConfig, names: Sequence[str], seed: int) -> Texts:
    if source.keep_labels:
        kept = {_label(int(name) if name.isdigit() else name, names, source, "keep_labels") for name in source.keep_labels}
        texts = texts.take([index for index, label in enumerate(texts.labels) if label in kept])
        if not len(texts):
            raise ConfigError(f"{source.name}: no training example has one of the labels {list(source.keep_labels)}")
    return _at_most(texts, source.max_examples, seed)


def _relabelled(texts: Texts, source: SourceConfig, names: Sequence[str], seed: int) -> Texts:
    """Replaces a share of the labels by labels drawn evenly, some of them the right ones."""
    count = round(source.label_noise * len(texts))
    if not count:
        return texts
    chosen = noise.permutation(seed, LABEL_NOISE, len(texts))[:count]
    drawn = noise.bits(seed, LABEL_NOISE + 1, count, stream=noise.Stream.CHOICE) % np.uint64(len(names))
    labels = np.array(texts.labels)
    labels[chosen] = drawn.astype(np.int64)
    return replace(texts, labels=tuple(labels.tolist()))


def _notices(public: Texts, private: Texts, names: Sequence[str]) -> tuple[str, ...]:
    """What a user should know about the cloud's texts."""
    if not len(public):
        return (
            "there is no public text: the cloud can guide nobody, devices learn from what they measure and from a trained head's gradient",
        )
    if UNLABELLED in private.labels or public.completions is not None:
        return ()  # what is learned are tokens, of which every text has its share
    if UNLABELLED in public.labels:
        return ("public text has no labels: the cloud can fit feedback maps on it, and nothing else",)
    missing = [names[label] for label in sorted(set(private.labels) - set(public.labels))]
    return (f"no public example of {', '.join(missing)}: the cloud cannot learn these classes, the devices can",) if missing else ()


def _at_most(texts: Texts, count: int | None, seed: int) -> Texts:
    if count is None or len(texts) <= count:
        return texts
    return texts.take(np.sort(noise.permutation(seed, len(texts), len(texts))[:count]).tolist())
