"""What a cloud takes from an edge: an answer to this very plan, or nothing, for a reason that is told.

Run: pytest tests/unit/test_judge.py
"""

from dataclasses import replace

import numpy as np
import pytest
import sample_messages
from stand_ins import MEASURED, cloud_of

from cooperllm.algorithm.compression import pack_vector
from cooperllm.cloud.judge import misfit
from cooperllm.config import FederationConfig
from cooperllm.messages import Feedback, Grouping, Outcome, Probes, RandomSlopes

SIZE = 6
ONES, NAN = np.ones(2, np.float32), np.full(2, np.nan, np.float32)
PLAN = sample_messages.plan(
    round_index=3,
    cohort=(4, 5, 9),
    num_columns=2,
    probes=Probes(measures_columns=True, num_random=2, grouping=Grouping.EDGE, column_scale=1.0, random_scale=1.0),
    feedback=Feedback(maps_version=-1, blocks=((0, 2), (2, 4)), bits=8, slope_scale=1.0),
)
REPORT = sample_messages.edge_report(
    PLAN,
    column_slopes=ONES,
    column_squares=ONES,
    random_slopes=(RandomSlopes(group=1, num_examples=8, slopes=ONES),),
    estimate=pack_vector(np.ones(SIZE, np.float32), 8),
    agreement=ONES,
    energy=ONES,
)


def test_an_answer_to_the_plan_fits():
    assert misfit(REPORT, PLAN, SIZE) is None


def random_slopes(*groups, slopes=ONES, num_examples=8):
    return tuple(RandomSlopes(group=group, num_examples=num_examples, slopes=slopes) for group in groups)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"round_index": 2}, "round 2 found, round 3 expected"),
        ({"num_devices": 4}, "4 devices with 8 examples found, at most 3 asked"),
        ({"num_examples": 1}, "2 devices with 1 examples found"),
        ({"num_devices": 0}, "examples without a device"),
        ({"column_slopes": ONES[:1]}, r"\(1, 2, 2, 2\) numbers of columns and blocks found, \(2, 2, 2, 2\) expected"),
        ({"energy": ONES[:0]}, r"\(2, 2, 2, 0\) numbers"),
        ({"column_slopes": NAN}, "slopes above 1e\\+15 found"),
        ({"column_slopes": ONES * np.float32(1e16)}, "slopes above 1e\\+15 found"),
        ({"agreement": NAN}, "or squares above"),
        ({"random_slopes": random_slopes(0)}, r"groups \[0\] found, each at most once and of \[1\] expected"),
        ({"random_slopes": random_slopes(1, 1)}, r"groups \[1, 1\] found"),
        ({"random_slopes": random_slopes(1, slopes=NAN)}, "not 2 numbers up to"),
        ({"random_slopes": random_slopes(1, slopes=ONES[:1])}, "not 2 numbers up to"),
        ({"random_slopes": random_slopes(1, num_examples=0)}, "not 2 numbers up to .* with a weight"),
        ({"estimate": None}, "no estimate found"),
        ({"estimate": b"nothing"}, "guide: 7 bytes found"),
        ({"estimate": pack_vector(np.ones(SIZE + 1, np.float32), 8)}, "columns of length 7 found, the model has 6"),
    ],
)
def test_what_is_no_answer_to_it_is_told(changes, sentence):
    found = misfit(replace(REPORT, **changes), PLAN, SIZE)
    assert found is not None
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(found)


def test_an_edge_none_of_whose_devices_could_be_used_is_heard_all_the_same():
    nothing = np.zeros(0, np.float32)
    silent = replace(
        REPORT, num_devices=0, num_examples=0, column_slopes=nothing, random_slopes=(), estimate=None, dropped={Outcome.LOST: 2}
    )
    assert misfit(silent, PLAN, SIZE) is None


@pytest.mark.parametrize(("grouping", "groups"), [(Grouping.SHARED, (0,)), (Grouping.DEVICE, (4, 9))])
def test_groups_are_those_of_the_plans_devices(grouping, groups):
    plan = replace(PLAN, probes=replace(PLAN.probes, grouping=grouping))
    assert misfit(replace(REPORT, random_slopes=random_slopes(*groups)), plan, SIZE) is None
    assert misfit(replace(REPORT, random_slopes=random_slopes(6)), plan, SIZE) is not None


def test_a_report_that_does_not_fit_costs_its_edge_the_round_and_the_run_goes_on(caplog):
    federation = FederationConfig(num_devices=4, num_edges=2, devices_per_round=4, min_reports=1)
    cloud, alone = (cloud_of([0, 1, 2] * 4, MEASURED, federation=federation) for _ in range(2))
    prepared = cloud.plan()
    columns = np.ones(prepared.plan.num_columns, np.float32)
    nothing = np.zeros(0, np.float32)
    good = replace(
        REPORT, round_index=0, column_slopes=columns, column_squares=columns, random_slopes=(), estimate=None, agreement=nothing,
        energy=nothing,
    )  # fmt: skip
    closed = cloud.close(prepared, [good, replace(good, edge_id=0, column_slopes=columns[:-1])])
    assert closed.dropped == {Outcome.MISMATCH: 1}
    assert closed.num_reports == 2
    assert closed.update.theta_hash == alone.close(alone.plan(), [good]).update.theta_hash
    assert "round 0: the report of edge 0 is not used" in caplog.text
