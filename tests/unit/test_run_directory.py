"""A run on disk: what a crash leaves is repaired, what no crash explains is refused, and refusing changes nothing.

Run: pytest tests/unit/test_run_directory.py
"""

import datetime
import errno
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import sample_messages

from cooperllm.algorithm.compression import pack_vector
from cooperllm.algorithm.divergence import Good
from cooperllm.config import ArmConfig, ArmName, RunConfig
from cooperllm.errors import RunDirectoryError
from cooperllm.link.codec import encode
from cooperllm.messages import FORMAT_VERSION, Maps, Snapshot
from cooperllm.run_directory import MAGIC, RECORD, Checkpoint, RunDirectory, config_hash
from cooperllm.status import read_status, status_words

ROUNDS = 4


def update(index):
    return sample_messages.update(index, column_coefficients=np.full(3, index, np.float32))


def record(index):
    body = encode(update(index))
    return RECORD.pack(len(body), zlib.crc32(body)) + body


def checkpoint():
    vector = np.arange(4, dtype=np.float32)
    snapshot = Snapshot(model_version=2, theta=vector, moments=(vector,))
    packed = pack_vector(vector, 8)
    shared = {"rank": 1, "factors": packed}
    maps = (
        Maps(version=1, base_version=-1, num_directions=1, directions=packed, num_components=1, basis=packed, **shared),
        Maps(version=2, base_version=1, num_directions=0, directions=None, num_components=0, basis=None, **shared),
    )
    good = Good(theta=vector - 1, loss=0.5)
    known = {"format_version": FORMAT_VERSION, "config_hash": config_hash(RunConfig())}
    return Checkpoint(**known, snapshot=snapshot, pool=(vector, vector + 1), maps=maps, good=good)


@pytest.fixture
def run(tmp_path):
    """A directory with a few rounds and a checkpoint."""
    directory = RunDirectory.create(tmp_path / "run", RunConfig())
    for index in range(ROUNDS):
        directory.append_update(update(index))
        directory.append_round({"round": index + 1, "loss": 0.5})
    directory.write_checkpoint(checkpoint())
    return directory


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.path.iterdir())}


def log(directory):
    return directory.path / "replay.log"


def refuses_and_keeps(directory, action, *parts):
    """The sentence names file and fault, and no byte of the run has changed."""
    before = contents(directory)
    with pytest.raises(RunDirectoryError) as caught:
        action()
    assert [part for part in parts if part not in str(caught.value)] == []
    assert contents(directory) == before


def versions(updates):
    return [entry.model_version for entry in updates]


def test_a_new_run_has_its_settings_and_an_empty_log(tmp_path):
    config = RunConfig(seed=5, arm=ArmConfig(name=ArmName.MEASURED, queries=3, basis_size=1))
    directory = RunDirectory.create(tmp_path / "a" / "b", config)
    assert directory.config() == config
    assert directory.updates() == directory.repair() == []
    assert directory.rounds() == []
    assert directory.checkpoint() is None


def test_what_was_appended_is_read_back(run):
    assert [encode(entry) for entry in run.updates()] == [encode(update(index)) for index in range(ROUNDS)]
    assert [figures["round"] for figures in run.rounds()] == [1, 2, 3, 4]
    assert encode(run.checkpoint()) == encode(checkpoint())


def test_the_log_is_its_documented_bytes(run):
    assert log(run).read_bytes() == MAGIC + b"".join(record(index) for index in range(ROUNDS))


@pytest.mark.parametrize("name", ["config.json", "notes.txt", ".hidden"])
def test_a_directory_with_anything_in_it_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match=r"not empty; choose another, or continue it with `cooperllm resume"):
        RunDirectory.create(tmp_path, RunConfig())
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_an_empty_directory_is_taken(tmp_path):
    RunDirectory.create(tmp_path, RunConfig())
    assert (tmp_path / "replay.log").read_bytes() == MAGIC


def test_a_file_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(RunDirectoryError, match="run"):
        RunDirectory.create(tmp_path / "run", RunConfig())
    assert (tmp_path / "run").read_text() == "precious"


def test_a_whole_run_needs_no_repair(run):
    before = contents(run)
    assert versions(run.repair()) == [0, 1, 2, 3]
    assert contents(run) == before


@pytest.mark.parametrize("kept", [1, RECORD.size - 1, RECORD.size, RECORD.size + 1, len(record(ROUNDS)) - 1])
def test_a_record_cut_short_by_a_crash_is_cut_off(run, kept):
    whole = log(run).read_bytes()
    log(run).write_bytes(whole + record(ROUNDS)[:kept])
    assert versions(run.updates()) == [0, 1, 2, 3]
    assert log(run).read_bytes() == whole + record(ROUNDS)[:kept], "reading alone must not repair"
    assert versions(run.repair()) == [0, 1, 2, 3]
    assert log(run).read_bytes() == whole
    run.append_update(update(ROUNDS))
    assert versions(run.updates()) == [0, 1, 2, 3, 4]


def test_a_log_one_round_ahead_is_cut_to_the_figures(run):
    """The crash came between the two appends."""
    whole = contents(run)
    run.append_update(update(ROUNDS))
    assert versions(run.repair()) == [0, 1, 2, 3]
    assert contents(run) == whole


def test_figures_one_round_ahead_are_cut_to_the_log(run):
    whole = contents(run)
    run.append_round({"round": ROUNDS + 1})
    assert versions(run.repair()) == [0, 1, 2, 3]
    assert contents(run) == whole


def test_a_line_cut_short_by_a_crash_is_cut_off_with_its_record(run):
    whole = contents(run)
    run.append_update(update(ROUNDS))
    with (run.path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 5, "lo')
    assert [figures["round"] for figures in run.rounds()] == [1, 2, 3, 4]
    assert versions(run.repair()) == [0, 1, 2, 3]
    assert contents(run) == whole


@pytest.mark.parametrize("lines", [0, 1, ROUNDS - 2])
def test_figures_that_lack_more_than_a_crash_can_take_are_refused(run, lines):
    """An emptied rounds.jsonl must not take the whole replay log with it."""
    file = run.path / "rounds.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:lines]))
    refuses_and_keeps(run, run.repair, "rounds.jsonl")


@pytest.mark.parametrize("records", [0, 1, ROUNDS - 2])
def test_a_log_that_lacks_more_than_a_crash_can_take_is_refused(run, records):
    log(run).write_bytes(MAGIC + b"".join(record(index) for index in range(records)))
    refuses_and_keeps(run, run.repair, "replay.log")


@pytest.mark.parametrize("index", range(ROUNDS))
@pytest.mark.parametrize("offset", [4, 7, RECORD.size, RECORD.size + 20, -1], ids=["checksum", "checksum's end", "body", "middle", "end"])
def test_a_damaged_byte_is_refused_by_file_and_record(run, index, offset):
    data = bytearray(log(run).read_bytes())
    start = len(MAGIC) + sum(len(record(i)) for i in range(index))
    data[start + offset % len(record(index))] ^= 0x10
    log(run).write_bytes(bytes(data))
    for action in (run.updates, run.repair):
        refuses_and_keeps(run, action, "replay.log", f"record {index}", "checksum", "nothing was changed")


@pytest.mark.parametrize("index", range(ROUNDS - 1))
@pytest.mark.parametrize("bit", [0, 3, 8, 16, 31])
def test_a_damaged_length_is_not_taken_for_a_crash(run, index, bit):
    """A length that points beyond the end of the file looks like a record cut short; what follows it shows that it is not."""
    data = bytearray(log(run).read_bytes())
    start = len(MAGIC) + sum(len(record(i)) for i in range(index))
    (length,) = struct.unpack_from("<I", data, start)
    struct.pack_into("<I", data, start, length ^ 1 << bit)
    log(run).write_bytes(bytes(data))
    refuses_and_keeps(run, run.repair, "replay.log")


def test_a_record_that_is_no_update_is_refused_by_file_and_record(run):
    """Its checksum is right: written by another version."""
    body = encode({"round_index": 9})
    with log(run).open("ab") as file:
        file.write(RECORD.pack(len(body), zlib.crc32(body)) + body)
    refuses_and_keeps(run, run.updates, "replay.log", f"record {ROUNDS}")


def test_a_log_that_does_not_begin_as_one_is_refused(run):
    log(run).write_bytes(b"CoopLog2" + log(run).read_bytes()[8:])
    refuses_and_keeps(run, run.repair, "replay.log", "does not begin as a replay log")


def test_a_missing_log_is_refused(run):
    log(run).unlink()
    for action in (run.updates, run.repair):
        refuses_and_keeps(run, action, "replay.log does not exist", "nothing was changed")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"round": 1}\n{"round": 2\n{"round": 3}\n{"round": 4}\n', 2),
        ('{"round": 1}\n\n{"round": 3}\n{"round": 4}\n', 2),
        ('{"round": 1}\n{"loss": 2}\n', 2),
        ('{"round": 1}\n7\n', 2),
        ('{"round": 1}\nnull\n', 2),
        ('{"round": 1}\n{"round": 3}\n', 2),
        ('{"round": 2}\n', 1),
    ],
)
def test_a_damaged_line_of_figures_is_refused_by_number(run, text, line):
    (run.path / "rounds.jsonl").write_text(text)
    for action in (run.rounds, run.repair):
        refuses_and_keeps(run, action, "rounds.jsonl", f"line {line}", "nothing was changed")


def test_figures_that_are_no_text_or_missing_are_refused(run):
    file = run.path / "rounds.jsonl"
    file.write_bytes(b'{"round": 1}\n\xff\xfe\n')
    refuses_and_keeps(run, run.repair, "rounds.jsonl", "nothing was changed")
    file.unlink()
    refuses_and_keeps(run, run.repair, "rounds.jsonl", "nothing was changed")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[]", b"7", b'{"num_rounds": 0}', b'{"num_rounds": "many"}', b'{"arm": {"name": "no such arm"}}'],
)
def test_damaged_settings_are_refused(run, data):
    (run.path / "config.json").write_bytes(data)
    refuses_and_keeps(run, run.config, "config.json", "nothing was changed")


def test_a_directory_without_settings_is_no_run(run):
    (run.path / "config.json").unlink()
    refuses_and_keeps(run, run.config, "config.json does not exist", "is not a run directory")


def test_a_damaged_checkpoint_is_refused_and_says_that_it_may_be_deleted(run):
    file = run.path / "checkpoint.bin"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (b"", whole[:5], whole[:-1], whole + b"\0", bytes(flipped)):
        file.write_bytes(data)
        refuses_and_keeps(run, run.checkpoint, "checkpoint.bin", "delete it: the replay log alone restores the run")


def test_a_checkpoint_of_another_version_is_refused(run):
    body = encode({"format_version": 0})
    (run.path / "checkpoint.bin").write_bytes(RECORD.pack(len(body), zlib.crc32(body)) + body)
    refuses_and_keeps(run, run.checkpoint, "checkpoint.bin is of another version", "delete it")


def test_a_second_process_cannot_write_to_the_same_run(run):
    refused = pytest.raises(RunDirectoryError, match="another process is writing to this run")
    with run.locked(), refused, RunDirectory(run.path).locked():
        raise AssertionError
    with RunDirectory(run.path).locked():
        pass


def test_the_lock_is_released_when_a_run_fails(run):
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with RunDirectory(run.path).locked():
        pass


def test_a_new_run_may_begin_under_its_own_lock(tmp_path):
    directory = RunDirectory(tmp_path)
    with directory.locked():
        RunDirectory.create(tmp_path, RunConfig())


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS = {
    "append_update": lambda run: run.append_update(update(ROUNDS)),
    "append_round": lambda run: run.append_round({"round": ROUNDS + 1}),
    "write_checkpoint": lambda run: run.write_checkpoint(checkpoint()),
    "write_json": lambda run: run.write_json("summary.json", {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_sentence_and_the_run_can_be_continued(run, monkeypatch, name):
    before = contents(run)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(RunDirectoryError, match=r"could not write \(No space left on device\); make room .* `cooperllm resume"):
            WRITERS[name](run)
    assert versions(run.repair()) == [0, 1, 2, 3]
    left = contents(run)
    assert {file: left[file] for file in before} == before


def test_a_full_disk_at_the_start_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", full_disk)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        RunDirectory.create(tmp_path / "run", RunConfig())


def test_readers_never_see_half_a_file(run, monkeypatch):
    """The old checkpoint stays until the new one is on disk."""
    before = (run.path / "checkpoint.bin").read_bytes()
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: seen.append((run.path / "checkpoint.bin").read_bytes()))
    run.write_bytes("checkpoint.bin", b"new")
    assert seen == [before]
    assert (run.path / "checkpoint.bin").read_bytes() == b"new"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_no_json_reader_accepts_are_not_written(run, value):
    before = contents(run)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append_round({"round": ROUNDS + 1, "loss": value})
    assert contents(run) == before


def test_settings_are_named_by_their_values(run):
    assert config_hash(run.config()) == config_hash(RunConfig())
    assert config_hash(RunConfig(seed=1)) != config_hash(RunConfig())
    assert json.loads((run.path / "config.json").read_text())["seed"] == 0


def test_status_says_where_a_run_is_from_its_files_alone(tmp_path):
    files = RunDirectory.create(tmp_path / "run", RunConfig(num_rounds=3))
    now = datetime.datetime.now(datetime.UTC)
    assert status_words(read_status(files.path, now)) == "demo, feedback, seed 0: round 0 of 3; no process is working on it"
    row = {"round": 1, "accuracy": 0.75, "seconds": 0.5, "private_loss": 0.6, "answered": [2, 4], "dropped": {"lost": 1}}
    files.append_round(row | {"bytes_down": 10, "bytes_up": 20, "bytes_between": 30})
    files.append_round(row | {"round": 2, "accuracy": None, "dropped": {"lost": 2}, "bytes_down": 1, "bytes_up": 2, "bytes_between": 3})
    with files.locked():
        said = status_words(read_status(files.path, now)).splitlines()
    assert said[0] == "demo, feedback, seed 0: round 2 of 3; a process is working on it"
    assert "took 0.5 s, loss 0.600; accuracy 75.0% after round 1" in said[1]
    assert said[2:] == [
        "devices that answered in it: 2, 4",
        "reports not used so far: 3 lost",
        "bytes to devices 11, from devices 22, between cloud and edges 33",
    ]
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        read_status(tmp_path, now)
