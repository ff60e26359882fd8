"""Which edges' reports count: those that answer this very plan. What is anything else is dropped and counted, and the run goes on."""

from cooperllm.algorithm.asked import LARGEST_NUMBER, are_usable, group_of, lengths_of, wants_estimate
from cooperllm.algorithm.compression import LARGEST, unpack_vector
from cooperllm.errors import DecodeError
from cooperllm.messages import EdgeReport, Plan


def misfit(report: EdgeReport, plan: Plan, num_parameters: int) -> str | None:
    """Says why a report cannot be folded.

    Args:
        report: Decoded, otherwise from anywhere.
        plan: The round.
        num_parameters: n.

    Returns:
        What was found and what was expected; None where it fits. One without a usable device only has to be of this round: nothing else
        of it is looked at.
    """
    if report.round_index != plan.round_index:
        return f"an answer to round {report.round_index} found, round {plan.round_index} expected"
    if not report.num_devices:
        return "examples without a device found" if report.num_examples else None
    if report.num_devices > len(plan.cohort) or report.num_examples < report.num_devices:
        return f"{report.num_devices} devices with {report.num_examples} examples found, at most {len(plan.cohort)} asked"
    return _of_slopes(report, plan) or _of_numbers(report, plan) or _of_estimate(report, plan, num_parameters)


def _of_slopes(report: EdgeReport, plan: Plan) -> str | None:
    if not report.random_slopes:
        return None
    expected = {group_of(plan, report.edge_id, device_id) for device_id in plan.cohort}
    groups = [entry.group for entry in report.random_slopes]
    if len(groups) != len(set(groups)) or not expected.issuperset(groups):
        return f"random slopes of groups {groups} found, each at most once and of {sorted(expected)} expected"
    _, num_random, _ = lengths_of(plan)
    if any(len(entry.slopes) != num_random or not entry.num_examples or not are_usable(entry.slopes) for entry in report.random_slopes):
        return f"random slopes found that are not {num_random} numbers up to {LARGEST_NUMBER:g} with a weight"
    return None


def _of_numbers(report: EdgeReport, plan: Plan) -> str | None:
    columns, _, blocks = lengths_of(plan)
    lengths = tuple(map(len, (report.column_slopes, report.column_squares, report.agreement, report.energy)))
    if lengths != (columns, columns, blocks, blocks):
        return f"{lengths} numbers of columns and blocks found, {(columns, columns, blocks, blocks)} expected"
    if not are_usable(report.column_slopes) or not are_usable(report.column_squares, report.agreement, report.energy, largest=LARGEST):
        return f"slopes above {LARGEST_NUMBER:g} found, or squares above {LARGEST:g}"
    return None


def _of_estimate(report: EdgeReport, plan: Plan, num_parameters: int) -> str | None:
    if wants_estimate(plan) != (report.estimate is not None):
        return f"{'an' if report.estimate is not None else 'no'} estimate found"
    try:
        if report.estimate is not None:
            unpack_vector(report.estimate, num_parameters)
    except DecodeError as error:
        return str(error)
    return None
