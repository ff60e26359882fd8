"""States of the frozen prefix: the same bits back, within a quota, and nothing that has been damaged."""

import contextlib
import resource

import numpy as np
import pytest

from cooperllm.algorithm import noise
from cooperllm.device.states import CHECKSUM_BYTES, StatesInMemory, StatesOnDisk

WIDTH = 6
NO_LIMIT = 1 << 30


def text(number, length=5):
    return np.arange(number, number + length, dtype=np.int64)


def made_of(token_ids):
    return noise.gaussian(3, int(token_ids[0]), len(token_ids) * WIDTH).reshape(len(token_ids), WIDTH)


def size_of(token_ids):
    return CHECKSUM_BYTES + 4 * len(token_ids) * WIDTH


def on_disk(directory, quota_bytes=NO_LIMIT):
    return StatesOnDisk(directory, WIDTH, quota_bytes)


@contextlib.contextmanager
def disk_that_takes(num_bytes):
    """A real failure of a real write: files of this process may not grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("make", [lambda _: StatesInMemory(), on_disk], ids=["memory", "disk"])
def test_states_come_back_bit_for_bit_and_others_not_at_all(make, tmp_path):
    store = make(tmp_path / "states")
    for number in range(3):
        store.put(text(number), made_of(text(number)))
    for number in range(3):
        found = store.get(text(number))
        assert found.dtype == np.float32
        assert np.array_equal(found, made_of(text(number)))
    assert store.get(text(3)) is None
    assert store.get(text(0, length=4)) is None


def test_a_device_that_starts_again_finds_its_states_and_counts_them(tmp_path):
    on_disk(tmp_path).put(text(0), made_of(text(0)))
    again = on_disk(tmp_path)
    assert np.array_equal(again.get(text(0)), made_of(text(0)))
    assert again.used_bytes == size_of(text(0))


def test_what_exceeds_the_quota_is_counted_and_not_kept(tmp_path):
    store = on_disk(tmp_path, quota_bytes=2 * size_of(text(0)) + 1)
    for number in range(4):
        store.put(text(number), made_of(text(number)))
    assert [store.get(text(number)) is not None for number in range(4)] == [True, True, False, False]
    assert store.num_refused == 2
    assert store.used_bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * size_of(text(0)) + 1


def test_states_that_are_written_again_take_their_room_once(tmp_path):
    store = on_disk(tmp_path, quota_bytes=size_of(text(0)))
    for _ in range(3):
        store.put(text(0), made_of(text(0)))
    assert (store.used_bytes, store.num_refused) == (size_of(text(0)), 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
    ids=["shorter", "longer", "empty", "one bit of a state", "one bit of the checksum"],
)
def test_a_damaged_file_is_not_believed_and_is_mended_by_the_next_writing(damage, tmp_path):
    store = on_disk(tmp_path)
    store.put(text(0), made_of(text(0)))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert store.get(text(0)) is None
    assert store.num_damaged == 1
    store.put(text(0), made_of(text(0)))
    assert np.array_equal(store.get(text(0)), made_of(text(0)))
    assert on_disk(tmp_path).used_bytes == size_of(text(0))


def test_a_full_disk_is_counted_and_leaves_nothing_half_written(tmp_path):
    store = on_disk(tmp_path)
    with disk_that_takes(size_of(text(0)) // 2):
        store.put(text(0), made_of(text(0)))
    assert store.get(text(0)) is None
    assert (store.num_refused, store.used_bytes, list(tmp_path.iterdir())) == (1, 0, [])
    store.put(text(0), made_of(text(0)))
    assert store.get(text(0)) is not None


def test_a_directory_that_cannot_be_made_keeps_nothing_and_stops_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file")
    store = on_disk(tmp_path / "taken" / "states")
    store.put(text(0), made_of(text(0)))
    assert store.num_refused == 1
    assert store.get(text(0)) is None
