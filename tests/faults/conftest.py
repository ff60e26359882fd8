"""A table at the end of `make faults`: what was done to a run, what became of it, and how long it took."""


def pytest_terminal_summary(terminalreporter):
    rows = [
        (
            dict(report.user_properties).get("case", report.nodeid.rpartition("::")[2]),
            "survived" if outcome == "passed" else outcome,
            report,
        )
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" or outcome == "error"
    ]
    if rows:
        terminalreporter.section("what a run survives")
        terminalreporter.write_line("| case | outcome | seconds |")
        terminalreporter.write_line("|---|---|---|")
    for case, outcome, report in rows:
        terminalreporter.write_line(f"| {case} | {outcome} | {report.duration:.0f} |")
