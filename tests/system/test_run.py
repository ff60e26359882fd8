"""Whole runs on a two-layer Llama of random weights: files, bits, interruption, every arm, every engine."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from interruption import Interrupt, interrupt_after

import cooperllm
from cooperllm.algorithm import replay
from cooperllm.algorithm.compression import unpack_vector
from cooperllm.assembly import Assembly, assemble
from cooperllm.config import AdapterKind, ArmName, EngineName, OptimizerConfig, OptimizerKind, Rectification
from cooperllm.errors import DivergenceError, QuorumError, RunDirectoryError
from cooperllm.link.loopback import Loopback
from cooperllm.messages import StepKind
from cooperllm.run_directory import RunDirectory

ARMS = list(ArmName)


def tiny(arm=ArmName.MEASURED, **changes):
    return replace(cooperllm.recipe("tiny").with_arm(arm), engine=EngineName.LOOPBACK, **changes)


def final_hash(path):
    return RunDirectory(path).updates()[-1].theta_hash


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_leaves_a_log_that_a_stranger_can_replay_bit_for_bit(tmp_path, arm):
    run = cooperllm.run(tiny(arm), tmp_path / "run")
    files = RunDirectory(run.path)
    replica = assemble(files).start
    for update in files.updates():
        replica = replay.apply(replica, update, files.config().optimizer)  # raises unless the digest is the cloud's
    assert replica.model_version == 4
    assert replica.state_hash == final_hash(run.path)


@pytest.mark.parametrize("arm", ARMS)
def test_theta_moves_in_every_arm(tmp_path, arm):
    """FwdLLM may wait for three rounds after its first step."""
    run = cooperllm.run(tiny(arm, num_rounds=5), tmp_path / "run")
    updates = RunDirectory(run.path).updates()
    assert len({update.theta_hash for update in updates}) == sum(update.kind is not StepKind.HOLD for update in updates) > 1


def test_a_run_directory_holds_everything_that_was_promised(tmp_path):
    run = cooperllm.run(tiny(), tmp_path / "run")
    names = {entry.name for entry in run.path.iterdir()}
    assert names >= {"config.json", "rounds.jsonl", "summary.json", "replay.log", "checkpoint.bin", "adapter", "report.html"}
    assert {"accuracy_by_rounds.png", "accuracy_by_forward_passes.png", "accuracy_by_bytes.png"} <= names
    arm = json.loads((run.path / "summary.json").read_text())["arms"]["measured"]
    promised = "rounds final_accuracy best_accuracy accuracy_by_round rounds_to queries_per_device_round forward_passes"
    promised += " bytes_up bytes_down wall_seconds seed"
    assert set(promised.split()) <= set(arm)
    assert [number for number, _ in arm["accuracy_by_round"]] == [0, 2, 4]
    assert arm["forward_passes"] == 4 * 3 * 2 * arm["queries_per_device_round"]  # rounds x devices x two points x queries


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("optimizer", list(OptimizerKind))
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, stop, optimizer):
    arm = ArmName.MEZO_FL if optimizer is OptimizerKind.SGD else ArmName.MEASURED  # which looks along a momentum that SGD has not
    config = tiny(arm, optimizer=OptimizerConfig(kind=optimizer))
    whole = cooperllm.run(config, tmp_path / "whole")
    with pytest.raises(Interrupt):
        cooperllm.run(config, tmp_path / "cut", interrupt_after(stop))
    cut = cooperllm.resume(tmp_path / "cut")
    assert (cut.path / "replay.log").read_bytes() == (whole.path / "replay.log").read_bytes()
    keys = ("accuracy_by_round", "bytes_down", "bytes_up", "bytes_between", "forward_passes")
    assert [cut.summary["arms"][arm.value][key] for key in keys] == [whole.summary["arms"][arm.value][key] for key in keys]


@pytest.mark.parametrize("arm", [ArmName.FEEDBACK, ArmName.FEDKSEED])
def test_with_a_round_of_staleness_an_interrupted_run_has_the_bits_and_bytes_of_an_uninterrupted_one(tmp_path, arm):
    config = tiny(arm, num_rounds=6, checkpoint_every=2, evaluate_every=6)
    stale = replace(config, federation=replace(config.federation, staleness=1))
    runs = [cooperllm.run(one, tmp_path / name) for one, name in ((config, "fresh"), (stale, "stale"))]
    assert final_hash(runs[0].path) != final_hash(runs[1].path)
    keys = ("round", "staleness", "theta_hash", "bytes_down", "bytes_up", "bytes_between", "answered", "num_reports")
    whole = [[row[key] for key in keys] for row in RunDirectory(tmp_path / "stale").rounds()]
    assert [row[1] for row in whole] == [0, 1, 1, 1, 1, 1]
    for stop, engine in ((2, EngineName.GRID), (5, EngineName.LOOPBACK)):
        with pytest.raises(Interrupt):
            cooperllm.run(replace(stale, engine=engine), tmp_path / str(stop), interrupt_after(stop))
        cooperllm.resume(tmp_path / str(stop))
        assert [[row[key] for key in keys] for row in RunDirectory(tmp_path / str(stop)).rounds()] == whole


def test_the_pool_of_public_gradients_survives_an_interruption(tmp_path):
    config = tiny(ArmName.PAPER, checkpoint_every=3)
    config = replace(config, arm=replace(config.arm, pool_size=3, rectification=Rectification.OPTIMAL))
    whole = cooperllm.run(config, tmp_path / "whole")
    for stop in (2, 3):
        with pytest.raises(Interrupt):
            cooperllm.run(config, tmp_path / str(stop), interrupt_after(stop))
        cooperllm.resume(tmp_path / str(stop))
        assert final_hash(tmp_path / str(stop)) == final_hash(whole.path)


@pytest.mark.parametrize(
    ("arm", "stops"),
    [(ArmName.FEDKSEED, [3]), (ArmName.FWDLLM, [2, 3, 4]), (ArmName.WARM_START, [1, 2, 3]), (ArmName.FEDAVG_BP_CHECKPOINTED, [3])],
)
def test_an_interrupted_baseline_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, arm, stops):
    """Cut in a warm start and after it; with held rounds in the checkpoint (after round 2), behind it, and just before their step."""
    config = tiny(arm, num_rounds=5, evaluate_every=5)
    config = replace(config, arm=replace(config.arm, variance_threshold=1e-9))
    whole = cooperllm.run(config, tmp_path / "whole")
    if arm is ArmName.FWDLLM:
        assert [update.kind is StepKind.HOLD for update in RunDirectory(whole.path).updates()] == [False, True, True, True, False]
    for stop in stops:
        with pytest.raises(Interrupt):
            cooperllm.run(config, tmp_path / str(stop), interrupt_after(stop))
        cut = cooperllm.resume(tmp_path / str(stop))
        assert (cut.path / "replay.log").read_bytes() == (whole.path / "replay.log").read_bytes()


def test_checkpointed_back_propagation_ends_with_the_bits_of_the_plain_one_and_half_as_many_passes_again(tmp_path):
    runs = [cooperllm.run(tiny(arm), tmp_path / arm.value) for arm in (ArmName.FEDAVG_BP, ArmName.FEDAVG_BP_CHECKPOINTED)]
    assert final_hash(runs[0].path) == final_hash(runs[1].path)
    plain, checkpointed = (next(iter(run.summary["arms"].values())) for run in runs)
    assert 2 * checkpointed["forward_passes"] == 3 * plain["forward_passes"] > 0
    assert checkpointed["uses_back_propagation_on_devices"]


def test_a_killed_process_loses_at_most_the_round_under_way(tmp_path):
    config = tiny(num_rounds=40)
    whole = cooperllm.run(config, tmp_path / "whole")
    path = tmp_path / "killed"
    RunDirectory.create(path, config)
    command = [sys.executable, "-c", "import sys, cooperllm; cooperllm.resume(sys.argv[1])", str(path)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(RunDirectory(path).updates()) < 3:
        assert process.poll() is None, "the run ended or failed before it could be killed"
        assert time.monotonic() < deadline, "three rounds took more than two minutes"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    survived = len(RunDirectory(path).updates())
    cooperllm.resume(path)
    assert 3 <= survived <= 40
    assert (path / "replay.log").read_bytes() == (whole.path / "replay.log").read_bytes()


def test_a_finished_run_is_reported_again_and_not_trained_again(tmp_path):
    run = cooperllm.run(tiny(), tmp_path / "run")
    log = (run.path / "replay.log").read_bytes()
    (run.path / "report.html").unlink()
    cooperllm.resume(run.path)
    assert (run.path / "replay.log").read_bytes() == log
    assert (run.path / "report.html").is_file()


def test_the_in_process_grid_gives_the_numbers_of_the_reference(tmp_path):
    loopback = cooperllm.run(tiny(), tmp_path / "loopback")
    grid = cooperllm.run(replace(tiny(), engine=EngineName.GRID), tmp_path / "grid")
    assert (grid.path / "replay.log").read_bytes() == (loopback.path / "replay.log").read_bytes()
    assert grid.summary["arms"]["measured"]["bytes_down"] == loopback.summary["arms"]["measured"]["bytes_down"]
    assert grid.summary["arms"]["measured"]["bytes_up"] == loopback.summary["arms"]["measured"]["bytes_up"]


def test_flowers_simulation_gives_the_numbers_of_the_reference(tmp_path):
    loopback = cooperllm.run(tiny(num_rounds=2), tmp_path / "loopback")
    simulated = cooperllm.run(replace(tiny(num_rounds=2), engine=EngineName.SIMULATION), tmp_path / "ray")
    assert (simulated.path / "replay.log").read_bytes() == (loopback.path / "replay.log").read_bytes()
    assert simulated.summary["arms"]["measured"]["bytes_down"] == loopback.summary["arms"]["measured"]["bytes_down"]


def test_batched_points_give_the_slopes_of_single_points(tmp_path):
    config = tiny(num_rounds=1)
    config = replace(config, arm=replace(config.arm, estimate_bits=32, step_bits=32))
    single = cooperllm.run(config, tmp_path / "single")
    batched = cooperllm.run(replace(config, activation_mib=64.0), tmp_path / "batched")
    size = single.summary["num_parameters"]
    one, many = (unpack_vector(RunDirectory(run.path).updates()[0].dense, size) for run in (single, batched))
    assert np.linalg.norm(one) > 1e-2
    # Float32 losses near 1 carry 6e-8; divided by 2 mu = 0.06 a slope carries 1e-6. One column and 12 probes of unit length add up.
    np.testing.assert_allclose(many, one, atol=2e-5)


def test_a_non_finite_loss_is_counted_and_the_round_goes_on(tmp_path, monkeypatch):
    poison_device(monkeypatch, 0)
    run = cooperllm.run(tiny(num_rounds=4), tmp_path / "run")
    arm = run.summary["arms"]["measured"]
    rounds = RunDirectory(run.path).rounds()
    asked = sum(0 in row["answered"] for row in rounds)
    assert asked > 0
    assert arm["dropped_reports"] == {"non-finite loss": asked}
    assert all(row["num_reports"] == 3 - (0 in row["answered"]) for row in rounds)


def test_a_missed_quorum_stops_the_run_with_a_sentence_and_resumes_later(tmp_path, monkeypatch):
    config = tiny(num_rounds=4)
    config = replace(config, federation=replace(config.federation, min_reports=3))
    with monkeypatch.context() as patch:
        poison_device(patch, 0)
        with pytest.raises(QuorumError, match=r"2 usable device reports, 3 required \(1 non-finite loss\)"):
            cooperllm.run(config, tmp_path / "run")
    assert cooperllm.resume(tmp_path / "run").summary["arms"]["measured"]["rounds"] == 4


def poison_device(monkeypatch, device_id):
    evaluate = Assembly.devices

    def devices(assembly):
        host = evaluate(assembly)
        host._runtimes[device_id].evaluate = lambda chosen: (lambda points: np.full(len(points), np.nan, np.float32), 1)
        return host

    monkeypatch.setattr(Assembly, "devices", devices)


def test_probing_never_moves_theta(tmp_path):
    files = RunDirectory.create(tmp_path / "run", tiny())
    assembly = assemble(files)
    host = assembly.devices()
    cloud, edges = assembly.cloud(), assembly.edges()
    before = assembly.start.theta.tobytes()
    plan = cloud.plan().plan
    Loopback(host).exchange([order for edge in edges for order in edge.fan_out(plan, assembly.start)])
    assert host._replica.theta.tobytes() == before
    assert cloud.replica.theta.tobytes() == before


def test_training_leaves_global_random_state_alone(tmp_path):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 -- the global state is the point
    cooperllm.run(tiny(num_rounds=1), tmp_path / "run")
    np.testing.assert_array_equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002 -- the global state is the point


@pytest.mark.parametrize("adapter", [AdapterKind.IA3, AdapterKind.FULL])
def test_other_adapters_train_and_export(tmp_path, adapter):
    config = tiny(num_rounds=2)
    targets = ("k_proj", "v_proj") if adapter is AdapterKind.IA3 else ()
    config = replace(config, model=replace(config.model, adapter=adapter, target_modules=targets))
    run = cooperllm.run(config, tmp_path / "run")
    assert len({update.theta_hash for update in RunDirectory(run.path).updates()}) == 2
    assert any((run.path / "adapter").glob("*.safetensors"))


def test_a_comparison_resumes_the_arm_that_was_cut(tmp_path):
    configs = [tiny(arm, num_rounds=2) for arm in (ArmName.CLOUD_ONLY, ArmName.MEZO_FL)]
    calls = []

    def stop_in_second(config, figures):
        calls.append(config.arm.name)
        if config.arm.name is ArmName.MEZO_FL:
            raise Interrupt

    with pytest.raises(Interrupt):
        cooperllm.compare(configs, tmp_path / "both", stop_in_second)
    trained_again = []
    both = cooperllm.resume(tmp_path / "both", lambda config, figures: trained_again.append(config.arm.name))
    assert trained_again == [ArmName.MEZO_FL]
    assert list(both.summary["arms"]) == ["cloud-only", "mezo-fl"]
    assert (both.path / "report.html").is_file()


@pytest.mark.parametrize("name", ["config.json", "replay.log", "rounds.jsonl", "checkpoint.bin"])
def test_a_damaged_file_is_named_and_nothing_is_overwritten(tmp_path, name):
    run = cooperllm.run(tiny(), tmp_path / "run")
    damaged = bytearray((run.path / name).read_bytes())
    damaged[len(damaged) // 3] ^= 0x10 if name != "rounds.jsonl" else 0
    if name == "rounds.jsonl":
        damaged[:1] = b"}"
    if name == "config.json":
        damaged = damaged[: len(damaged) // 2]
    (run.path / name).write_bytes(damaged)
    before = {file.name: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    with pytest.raises(RunDirectoryError, match=name):
        cooperllm.resume(run.path)
    assert {file.name: file.read_bytes() for file in run.path.iterdir() if file.is_file()} == before


def test_a_second_run_into_the_same_directory_is_refused(tmp_path):
    cooperllm.run(tiny(num_rounds=1), tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="not empty"):
        cooperllm.run(tiny(num_rounds=1), tmp_path / "run")


def test_a_diverged_run_says_so(tmp_path):
    config = tiny(ArmName.CLOUD_ONLY)
    config = replace(config, arm=replace(config.arm, learning_rate=1e30))
    with pytest.raises(DivergenceError, match=r"the run has diverged; repeat it with a learning rate below 1e\+30"):
        cooperllm.run(config, tmp_path / "run")


def test_ctrl_c_tells_how_to_continue(tmp_path, monkeypatch, capsys):
    from cooperllm import cli

    monkeypatch.setattr(sys, "argv", ["cooperllm", "run", "tiny", "--out", "cut", "--engine", "loopback"])
    original = RunDirectory.append_round

    def interrupted(self, figures):
        original(self, figures)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_round", interrupted)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 130
    assert "continue with: cooperllm resume cut" in " ".join(capsys.readouterr().out.split())
    assert cooperllm.resume("cut").summary["arms"]["feedback"]["rounds"] == 4
