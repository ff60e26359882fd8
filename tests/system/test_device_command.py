"""A device by itself: `cooperllm device --measure`, budgets that real processes keep, and states that a disk keeps or refuses.

Run: pytest tests/system/test_device_command.py
"""

import json
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from cooperllm.cli import app
from cooperllm.device import governor
from cooperllm.device.onnx_forward import OnnxForward, open_package
from cooperllm.device.settings import Settings, ladder
from cooperllm.device.states import StatesOnDisk
from cooperllm.device.trial import Findings, Task
from cooperllm.errors import ConfigError, PackageError
from cooperllm.process_memory import is_measurable

pytestmark = pytest.mark.skipif(not is_measurable(), reason="no /proc on this system")

TEXTS = ["a fine film", "it fell apart, and nobody in the room was sorry about it", "fine", "what a waste of an evening"]
NOISE_MIB = 6.0
"""What the same process takes more or less from one time to the next, and never more than a tenth of it."""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A model with a frozen layer, a last layer, and label words."""
    path = tmp_path_factory.mktemp("device") / "package"
    result = CliRunner().invoke(app, ["package", str(path), "--recipe", "tiny", "--last-layers", "1"])
    assert result.exit_code == 0, result.output
    return path


def govern(package, directory, budget_mib=None, **options):
    given = {"states_quota_mib": 64.0, "batch_size": 4, "num_threads": 1} | options
    return governor.govern(package, budget_mib, directory, **given)


@pytest.fixture(scope="module")
def trials(package, tmp_path_factory):
    """Everything that can be chosen, measured once."""
    return govern(package, tmp_path_factory.mktemp("states"))[1]


def device_of(package, settings, texts=TEXTS):
    opened = open_package(package, settings)
    return OnnxForward(opened, opened.encode(texts, None, [0] * len(texts)), range(len(texts)), None), opened


def test_the_command_shows_what_a_package_takes_without_loading_pytorch(package, tmp_path):
    words = ["cooperllm", "device", "--measure", str(package), "--batch-size", "4", "--cache-directory", str(tmp_path)]
    program = (
        f"import sys; sys.argv = {words!r}\ntry:\n    from cooperllm.cli import main; main()\nfinally:\n    print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "150"})
    shown, modules = done.stdout.rsplit("\n[", 1)
    assert not {"'torch'", "'transformers'", "'peft'", "'datasets'", "'onnx'", "'flwr'"} & set(modules.replace("]", "").split(", "))
    for expected in ("MiB at the peak", "phase's", "two-point query", "estimate", "Chosen without a limit", "billion operations"):
        assert expected in shown
    assert list(tmp_path.iterdir()) == [], "a trial has left something behind"


def test_the_process_that_measures_loads_no_pytorch_either(package, tmp_path):
    task = Task(package=str(package), settings=Settings(), batch_size=2, num_threads=1)
    program = (
        "import sys\nfrom cooperllm.device import trial\ntrial.main()\nassert 'torch' not in sys.modules and 'typer' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], input=msgspec.json.encode(task), stdout=subprocess.PIPE, check=True)
    found = msgspec.json.decode(done.stdout, type=Findings)
    assert [phase.name for phase in found.phases] == ["imports", "package opened", "frozen prefix", "two-point query", "estimate"]
    assert all(phase.footprint.dirty_mib > 0 for phase in found.phases)
    assert found.multiplications > 0
    assert found.gflops > 0


def test_a_device_with_the_chosen_settings_keeps_its_budget(package, trials, tmp_path):
    frugal, generous = trials[0].findings.peak_mib, trials[-1].findings.peak_mib
    budget_mib = (frugal + generous) / 2 + NOISE_MIB
    choice, _ = govern(package, tmp_path, budget_mib)
    (again,) = governor.tried(package, [choice.settings], batch_size=4, num_threads=1, budget_mib=None)
    assert again.findings.peak_mib <= budget_mib + NOISE_MIB


def test_a_budget_too_small_names_one_that_is_not(package, tmp_path):
    with pytest.raises(ConfigError, match=r"found 20, expected at least \d+") as refused:
        govern(package, tmp_path, 20.0)
    smallest = int(str(refused.value).split("expected at least ")[1].split(":")[0])
    choice, found = govern(package, tmp_path, smallest + NOISE_MIB)
    assert choice.findings.peak_mib <= smallest + NOISE_MIB
    assert all(trial.findings.peak_mib <= smallest + NOISE_MIB for trial in found[:-1]), "it went on behind what did not fit"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [({"budget_mib": 0.0}, "memory_mib"), ({"states_quota_mib": -1.0}, "cache_mib"), ({"batch_size": 0}, "batch_size"),
     ({"num_threads": 0}, "threads")],
)  # fmt: skip
def test_a_mistake_stops_before_anything_runs(option, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        govern(tmp_path / "no package", tmp_path, **option)


def test_a_damaged_package_is_refused_in_its_own_words(package, tmp_path):
    damaged = tmp_path / "package"
    damaged.mkdir()
    for file in package.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "weights.bin" else None])
    with pytest.raises(PackageError, match=r"weights.bin: 100 bytes found"):
        govern(damaged, tmp_path / "states")


@pytest.mark.parametrize("number", range(5))
def test_no_setting_changes_what_is_computed(package, number, tmp_path):
    """States on disk are the same bits; passes and packed weights only change the order of sums."""
    plain, opened = device_of(package, Settings())
    other, _ = device_of(package, ladder(str(tmp_path), 64.0)[number])
    theta, chosen = opened.theta + np.float32(0.01), range(len(TEXTS))
    other.prepare()
    assert other.evaluate(chosen)[0](theta[None]) == pytest.approx(plain.evaluate(chosen)[0](theta[None]), abs=1e-6)
    (mine, my_loss), (found, loss) = plain.estimate(theta, chosen, None), other.estimate(theta, chosen, None)
    assert np.linalg.norm(found - mine) <= 1e-5 * np.linalg.norm(mine)
    assert loss == pytest.approx(my_loss, abs=1e-6)


def test_states_on_disk_save_the_prefix_when_a_device_starts_again(package, tmp_path):
    settings = Settings(states_directory=str(tmp_path))
    first, _ = device_of(package, settings)
    first.prepare()
    again, opened = device_of(package, settings)
    opened.run = refused_prefix(opened.run)
    before = first.evaluate([0, 1])[0](opened.theta[None])
    assert np.array_equal(again.evaluate([0, 1])[0](opened.theta[None]), before)


def refused_prefix(run):
    def checked(graph, given):
        assert graph != "prefix", "the prefix ran although its states are on disk"
        return run(graph, given)

    return checked


def test_states_of_another_package_are_not_read(package, tmp_path):
    other = tmp_path / "other"
    assert CliRunner().invoke(app, ["package", str(other), "--recipe", "tiny", "--last-layers", "1", "--seed", "5"]).exit_code == 0
    settings = Settings(states_directory=str(tmp_path / "states"))
    for path in (package, other):
        device_of(path, settings)[0].prepare()
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_a_disk_without_room_changes_nothing_but_time_and_is_told(package, tmp_path):
    (tmp_path / "taken").write_text("a file where the directory would be")
    device, opened = device_of(package, Settings(states_directory=str(tmp_path / "taken" / "states")))
    plain, _ = device_of(package, Settings())
    device.prepare()
    assert np.array_equal(device.evaluate([0, 1])[0](opened.theta[None]), plain.evaluate([0, 1])[0](opened.theta[None]))
    assert isinstance(opened.states, StatesOnDisk)
    assert opened.states.num_refused > 0
    choice, trials = govern(package, tmp_path / "taken", states_quota_mib=0.0)
    assert not trials[0].findings.is_on_disk
    assert choice in trials


def test_a_mistyped_package_is_one_sentence_on_one_line_of_the_errors(tmp_path):
    mistyped = tmp_path / "a directory whose name is long enough" / "to be broken in two by a console of eighty columns"
    result = subprocess.run(
        [sys.executable, "-c", "from cooperllm.cli import main; main()", "device", "--measure", str(mistyped)],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert f"{mistyped} is not a device package" in sentence


def test_a_missing_library_names_the_extra_that_brings_it(tmp_path):
    hide = "import sys, json; sys.modules['torch'] = None; sys.modules['transformers'] = None; sys.argv = json.loads(sys.argv[1])"
    words = ["cooperllm", "run", "tiny", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}\nfrom cooperllm.cli import main; main()", json.dumps(words)],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'cooperllm[cloud]'" in done.stderr
    assert not (tmp_path / "run").exists()
