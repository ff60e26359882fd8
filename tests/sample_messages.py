"""Small valid messages to begin with; arguments replace single fields."""

from dataclasses import replace

import numpy as np

from cooperllm.messages import DeviceReport, EdgeReport, Outcome, Plan, Update


def plan(**changes):
    """A round that asks for nothing until it is told what."""
    empty = Plan(
        round_index=0,
        model_version=0,
        guide_version=-1,
        theta_hash=bytes(16),
        seed=5,
        cohort=(),
        batch_size=4,
        guide=None,
        guide_hash=bytes(16),
        num_columns=0,
    )
    return replace(empty, **changes)


def update(version=0, **changes):
    """A step of length zero, not sealed."""
    nowhere = Update(
        round_index=version,
        model_version=version,
        seed=version,
        learning_rate=0.1,
        guide=None,
        column_coefficients=np.zeros(0, np.float32),
        random_terms=(),
        dense=None,
        loss=0.5,
        theta_hash=bytes(16),
    )
    return replace(nowhere, **changes)


def device_report(device_id, asked, **changes):
    """A usable answer to a plan, without numbers."""
    nothing = np.zeros(0, np.float32)
    silent = DeviceReport(
        device_id=device_id,
        round_index=asked.round_index,
        model_version=asked.model_version,
        guide_version=asked.guide_version,
        num_examples=4,
        outcome=Outcome.OK,
        loss=0.5,
        column_slopes=nothing,
        random_slopes=nothing,
        column_deviation=0.0,
        random_deviation=0.0,
        estimate=None,
        agreement=nothing,
        energy=nothing,
        forward_passes=8,
    )
    return replace(silent, **changes)


def edge_report(asked, **changes):
    """The fold of two usable answers to a plan, without numbers."""
    nothing = np.zeros(0, np.float32)
    silent = EdgeReport(
        edge_id=1,
        round_index=asked.round_index,
        num_devices=2,
        num_examples=8,
        dropped={},
        loss=0.5,
        column_slopes=nothing,
        column_squares=nothing,
        random_slopes=(),
        estimate=None,
        agreement=nothing,
        energy=nothing,
        forward_passes=4,
    )
    return replace(silent, **changes)
