"""Sources, labels and partitions; every mistake in them gets a sentence."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from cooperllm import data
from cooperllm.config import DataConfig, FederationConfig, Partition, RunConfig, SourceConfig
from cooperllm.errors import ConfigError

ROWS = [{"text": f"sentence number {index}", "label": index % 3, "who": f"device {index % 4}"} for index in range(60)]
FEDERATION = FederationConfig(num_devices=4, num_edges=2, devices_per_round=2)


def write(path, rows=ROWS):
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(private, public=None, federation=FEDERATION):
    private = private if isinstance(private, SourceConfig) else SourceConfig(name=private)
    return data.load(DataConfig(public=public or private, private=private), federation, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_single_file_is_split_and_no_text_is_in_two_parts(tmp_path, suffix):
    task = load(write(tmp_path / f"rows{suffix}"))
    parts = [set(part.texts) for part in (task.private, task.validation, task.test)]
    assert [len(part) for part in parts] == [49, 6, 5]  # a tenth of 60, then a tenth of 54
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_a_directory_keeps_its_own_parts(tmp_path):
    for part, size in (("train", 40), ("validation", 8), ("test", 12)):
        write(tmp_path / f"{part}.jsonl", ROWS[:size])
    task = load(str(tmp_path))
    assert (len(task.private), len(task.validation), len(task.test)) == (40, 8, 12)


def test_labels_may_be_names_and_columns_may_be_called_anything(tmp_path):
    rows = [{"body": row["text"], "topic": ["art", "law", "sea"][row["label"]]} for row in ROWS]
    source = SourceConfig(name=write(tmp_path / "rows.jsonl", rows), text_column="body", label_column="topic")
    task = load(source)
    assert task.label_names == ("art", "law", "sea")
    assert set(task.private.labels) == {0, 1, 2}


def test_a_class_that_the_cloud_lacks_is_allowed_and_said(tmp_path):
    name = write(tmp_path / "rows.jsonl")
    task = load(name, SourceConfig(name=name, keep_labels=("0", "2")))
    assert set(task.public.labels) == {0, 2}
    assert set(task.private.labels) == {0, 1, 2}
    assert "no public example of 1" in task.notices[0]


def test_public_text_may_have_no_labels_and_no_label_column(tmp_path):
    public = write(tmp_path / "public.jsonl", [{"text": "any text"}] * 5)
    task = load(write(tmp_path / "rows.jsonl"), SourceConfig(name=public, label_column=None))
    assert (task.public.texts, task.public.labels) == (("any text",) * 5, (-1,) * 5)
    assert "no labels" in task.notices[0]


def test_a_cloud_may_have_no_text_at_all(tmp_path):
    task = load(write(tmp_path / "rows.jsonl"), SourceConfig(name="none", second_text_column="other"))
    assert (len(task.public), len(task.private)) == (0, 49)
    assert "no public text" in task.notices[0]


@pytest.mark.parametrize("source", [{"name": "none"}, {"label_column": None}])
def test_devices_without_text_or_labels_are_refused(source):
    with pytest.raises(ConfigError, match=r"data\.private"):
        RunConfig(data=DataConfig(private=SourceConfig(**source)))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_label_noise_replaces_the_share_it_says_by_labels_drawn_evenly(tmp_path, share):
    rows = [{"text": f"sentence {index}", "label": index % 3} for index in range(3000)]
    name = write(tmp_path / "rows.jsonl", rows)
    task = load(name, SourceConfig(name=name, label_noise=share))
    wrong = [label != int(text.split()[1]) % 3 for text, label in zip(task.public.texts, task.public.labels, strict=True)]
    # A drawn label is wrong two times in three; four standard deviations of a mean of 3,000.
    assert abs(np.mean(wrong) - share * 2 / 3) <= 4 * (share * 2 / 9 / 3000) ** 0.5
    assert load(name, SourceConfig(name=name, label_noise=share)).public.labels == task.public.labels
    assert task.private.labels == load(name).private.labels


def test_the_seed_decides_which_examples_are_kept(tmp_path):
    source = SourceConfig(name=write(tmp_path / "rows.jsonl"), max_examples=10)
    config = DataConfig(public=source, private=source)
    first, again, other = (data.load(config, FEDERATION, seed).private.texts for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == 10


@pytest.mark.parametrize("partition", [Partition.IID, Partition.DIRICHLET])
def test_a_partition_gives_every_example_to_exactly_one_device(tmp_path, partition):
    private = load(write(tmp_path / "rows.jsonl")).private
    federation = FederationConfig(num_devices=4, num_edges=2, devices_per_round=2, partition=partition)
    shards = data.partition(private, federation, 5)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(private)))
    assert all(len(shard) for shard in shards)
    again = data.partition(private, federation, 5)
    assert all(np.array_equal(one, two) for one, two in zip(shards, again, strict=True))


def test_the_column_partition_follows_the_column(tmp_path):
    federation = FederationConfig(num_devices=4, num_edges=2, devices_per_round=2, partition=Partition.COLUMN, partition_column="who")
    private = load(write(tmp_path / "rows.jsonl"), federation=federation).private
    for shard in data.partition(private, federation, 0):
        assert len({private.groups[index] for index in shard}) == 1


def test_a_column_with_another_number_of_values_is_refused(tmp_path):
    federation = FederationConfig(num_devices=5, num_edges=1, partition=Partition.COLUMN, partition_column="who")
    private = load(write(tmp_path / "rows.jsonl"), federation=federation).private
    with pytest.raises(ConfigError, match="num_devices: found 5, expected 4"):
        data.partition(private, federation, 0)


def test_more_devices_than_examples_are_refused(tmp_path):
    private = load(write(tmp_path / "rows.jsonl")).private
    with pytest.raises(ConfigError, match="100 devices for 49 private examples"):
        data.partition(private, FederationConfig(num_devices=100), 0)


def test_a_partition_that_leaves_a_device_empty_is_refused(tmp_path):
    private = load(write(tmp_path / "rows.jsonl")).private
    with pytest.raises(ConfigError, match="leaves one of 30 devices without examples"):
        data.partition(private, FederationConfig(num_devices=30, dirichlet_alpha=0.01), 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_column": "body"}, r"columns \['text', 'label', 'who'\], expected one named 'body'"),
        ({"label_column": "class"}, "expected one named 'class'"),
        ({"second_text_column": "text2"}, "expected one named 'text2'"),
        ({"keep_labels": ("7",)}, r"label 7 found, expected one of \['0', '1', '2'\]"),
    ],
)
def test_a_wrong_column_or_label_is_named(tmp_path, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(SourceConfig(name=write(tmp_path / "rows.jsonl"), **change))


def test_a_public_label_outside_the_label_set_is_named(tmp_path):
    public = SourceConfig(name=write(tmp_path / "public.jsonl", [*ROWS, {"text": "?", "label": 9, "who": "x"}]))
    with pytest.raises(ConfigError, match=r"public.jsonl .*label 9 found, expected one of"):
        load(write(tmp_path / "rows.jsonl"), public)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("broken.jsonl", '{"text": ', "could not be read as jsonl"),
        ("broken.parquet", "no parquet", "could not be read as parquet"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load(str(tmp_path / name))


def test_a_directory_without_a_train_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no train file"):
        load(str(tmp_path))


def test_an_unreachable_hub_name_is_refused_with_the_alternatives():
    with pytest.raises(ConfigError, match="is not a file, not a directory, and could not be loaded from the hub"):
        load("no-such-organisation/no-such-set")


def test_an_unknown_generated_domain_is_refused():
    with pytest.raises(ConfigError, match="opera"):
        load(SourceConfig(domains=("opera",)))


@pytest.fixture
def far_away(tmp_path, monkeypatch):
    """A data set that is read as those of the hub are, from a file; a stream of it is a real one."""
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(500)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _name, streaming: own("json", data_files=str(tmp_path / "rows.jsonl"), streaming=streaming)
    )
    return SourceConfig(name="somebody/reviews", streams=True, max_examples=40)


def streamed(source, seed):
    task = data.load(DataConfig(public=source, private=source), FederationConfig(num_devices=2, devices_per_round=2, num_edges=1), seed)
    return task, {*task.private.texts, *task.validation.texts, *task.test.texts}


def test_of_a_streamed_data_set_so_many_examples_are_read_and_the_seed_says_which(far_away):
    task, found = streamed(far_away, 1)
    assert len(found) == 40
    assert len(task.public) == 40
    assert (len(task.validation), len(task.test)) == (4, 3)
    assert streamed(far_away, 1)[1] == found
    assert streamed(far_away, 2)[1] != found
    assert not found <= {f"text {number}" for number in range(60)}, "not the first ones"


def test_without_a_stream_all_of_a_data_set_is_chosen_from(far_away):
    task, found = streamed(replace(far_away, streams=False), 1)
    assert len(task.private) == 40
    assert len(found) == 40 + 50 + 45, "a tenth for each part that is missing"


def test_a_stream_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="max_examples: found None, expected a number where a data set is streamed"):
        SourceConfig(name="somebody/reviews", streams=True)
