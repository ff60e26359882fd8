"""Settings of the whole suite: an empty environment, one thread, reproducible properties."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repository")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    """No test reads or writes the directory it was started from."""
    monkeypatch.chdir(tmp_path)
