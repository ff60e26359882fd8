"""How a device chooses between memory and time, and what memory is."""

import mmap
import subprocess
import sys

import numpy as np
import pytest

from cooperllm.device.governor import Trial, chosen
from cooperllm.device.settings import Settings, ladder
from cooperllm.device.trial import ESTIMATE, SLOPES, Findings, Phase
from cooperllm.errors import ConfigError
from cooperllm.process_memory import Footprint, footprint, is_measurable, reset_peak

needs_proc = pytest.mark.skipif(not is_measurable(), reason="no /proc on this system")


def phase(name, peak_mib, cpu_s):
    return Phase(name=name, footprint=Footprint(peak_mib=peak_mib, resident_mib=1.0, dirty_mib=1.0, mapped_mib=0.0), cpu_s=cpu_s)


def trial(peak_mib, query_s, estimate_s=0.0, **settings):
    phases = (phase("package opened", peak_mib - 1, 0.0), phase(SLOPES, peak_mib, query_s), phase(ESTIMATE, peak_mib - 2, estimate_s))
    return Trial(settings=Settings(**settings), findings=Findings(phases=phases))


FRUGAL, MIDDLE, FAST = trial(100, 0.9, rows_per_pass=1), trial(120, 0.5), trial(180, 0.3, rows_per_pass=512)


@pytest.mark.parametrize(
    ("budget_mib", "expected"), [(None, FAST), (180.0, FAST), (179.9, MIDDLE), (120.0, MIDDLE), (119.0, FRUGAL), (100.0, FRUGAL)]
)
def test_the_fastest_that_fits_is_taken(budget_mib, expected):
    assert chosen([FRUGAL, MIDDLE, FAST], budget_mib) is expected


def test_more_memory_is_not_taken_for_hardly_less_time():
    assert chosen([FRUGAL, trial(150, 0.85)], None) is FRUGAL


def test_estimates_count_as_much_as_queries():
    slow, fast = trial(100, 0.1, 2.0), trial(150, 0.1, 0.2)
    assert chosen([slow, fast], None) is fast


def test_a_budget_that_nothing_fits_is_refused_with_the_smallest_that_would():
    with pytest.raises(ConfigError, match=r"found 99, expected at least 100: .* one text a pass"):
        chosen([FRUGAL, MIDDLE], 99.0)
    assert chosen([FRUGAL], 100.0) is FRUGAL


def test_the_smallest_is_found_wherever_it_stands():
    with pytest.raises(ConfigError, match="at least 91"):
        chosen([FRUGAL, trial(90.2, 1.0)], 50.0)


def test_settings_go_from_frugal_to_generous():
    steps = ladder("states", 10.0)
    assert [one.rows_per_pass for one in steps] == sorted(one.rows_per_pass for one in steps)
    assert [one.keeps_graphs for one in steps] == sorted(one.keeps_graphs for one in steps)
    assert [one.packs_weights for one in steps] == sorted(one.packs_weights for one in steps)
    assert Settings() in steps
    assert len({one.words for one in steps}) == len(steps)


def test_a_querys_rate_is_operations_over_time():
    # Two points of 10 tokens, 1e6 multiplications and as many additions each: 4e7 operations in .01 s are 4 GFLOP/s.
    found = Findings(phases=(phase(SLOPES, 1.0, 0.01),), num_tokens=10, multiplications=10**6)
    assert found.query_gflops == pytest.approx(4.0)
    assert Findings(phases=(phase(SLOPES, 1.0, 0.0),)).query_gflops == 0


@needs_proc
def test_dirty_memory_is_what_a_process_has_written():
    before = footprint()
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as written:
        for _ in range(32):
            written.write(b"1" * (1 << 20))
        after = footprint()
    assert 28 <= after.dirty_mib - before.dirty_mib <= 40
    assert after.peak_mib >= after.resident_mib >= after.dirty_mib


@needs_proc
def test_a_peak_begins_anew_when_told_to():
    np.ones(64 << 20, np.uint8)  # written, and given back at once
    before = footprint()
    if not reset_peak():
        pytest.skip("this system keeps peaks")
    assert footprint().peak_mib <= before.resident_mib + 8 < before.peak_mib


@needs_proc
def test_a_process_that_has_ended_holds_nothing():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert footprint(process.pid) == Footprint(peak_mib=0, resident_mib=0, dirty_mib=0, mapped_mib=0)
