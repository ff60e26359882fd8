"""The check of a package on two machines: what a device's program gives here, and what is told apart.

Run: pytest tests/system/test_portability.py
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "benchmarks" / "portability"
WRITES = (
    "import sys, pathlib, check; from cooperllm.config import Variant; "
    "check.write_packages(pathlib.Path(sys.argv[1]), [('tiny', Variant.FP32)])"
)


@pytest.fixture(scope="module")
def check():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLACE))
        yield importlib.import_module("check")


@pytest.fixture(scope="module")
def result(check, tmp_path_factory):
    """What the program writes about the tiny model, from a process that must not have loaded PyTorch."""
    work = tmp_path_factory.mktemp("portability")
    # In a process of its own, where the exporter is several times as fast as in a fixture under pytest.
    subprocess.run([sys.executable, "-c", WRITES, str(work)], check=True, cwd=PLACE)
    return check.run_program([sys.executable], work / "result.json", (work / "tiny-fp32", work / "tiny-given"), [ROOT / "src"])


def test_a_machine_agrees_with_itself_on_everything_that_a_device_computes(check, result):
    assert set(result["digests"]) == {
        "bits", "gaussian", "rademacher", "decoded", "permutation", "messages", "span", "state", "maps",
    }  # fmt: skip
    found = check.compare("tiny-fp32", "cortex-a72", result, result)
    assert (found.unequal, found.losses, found.slopes, found.estimate, found.complaint) == ((), 0, 0, 0, None)
    assert any(result["slopes"])
    assert any(result["estimate"])


@pytest.mark.parametrize("name", ["state", "gaussian"])
def test_one_other_digest_is_a_complaint_that_names_it(check, result, name):
    other = result | {"digests": result["digests"] | {name: "00"}}
    assert check.compare("tiny-int8", "cortex-a72", result, other).complaint.startswith(f"tiny-int8 on cortex-a72: other bits of {name} ")


def test_a_missing_digest_and_another_token_are_complaints(check, result):
    fewer = {name: one for name, one in result["digests"].items() if name != "state"}
    tokens = [[*row[:-1], row[-1] + 1] for row in result["token_ids"]]
    found = check.compare("tiny-fp32", "cortex-a72", result, result | {"digests": fewer, "token_ids": tokens})
    assert found.unequal == ("state", "tokens")


def test_slopes_that_differ_by_more_than_rounding_are_a_complaint_of_float32_alone(check, result):
    other = result | {"slopes": [1.0001 * slope for slope in result["slopes"]]}
    assert "slopes differ by 1.0e-04 " in check.compare("tiny-fp32", "cortex-a76", result, other).complaint
    assert check.compare("tiny-int8", "cortex-a76", result, other).complaint is None


def test_slopes_that_are_no_numbers_are_a_complaint(check, result):
    other = result | {"slopes": [float("nan")] * len(result["slopes"])}
    assert check.compare("tiny-fp32", "cortex-a76", result, other).complaint is not None


def test_a_machine_that_cannot_emulate_says_why_and_passes(tmp_path):
    command = [sys.executable, str(PLACE / "check.py"), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    found = subprocess.run(command, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("skipped: ")
    assert not (tmp_path / "results").exists()
