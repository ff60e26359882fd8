"""The cloud's back-propagation under accelerate: one process, two of them, another precision, another device."""

import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import cooperllm
from cooperllm import accelerated, models
from cooperllm.accelerated import Accelerated
from cooperllm.algorithm import replay
from cooperllm.assembly import assemble
from cooperllm.cloud import BackPropagation
from cooperllm.config import ModelConfig, Objective
from cooperllm.errors import ConfigError
from cooperllm.run_directory import RunDirectory

TINY = ModelConfig(name="tiny-llama", target_modules=("q_proj", "v_proj"), last_layers=1, max_tokens=64)
NEXT = replace(TINY, objective=Objective.NEXT_TOKEN)
TEXTS = ["A stirring film, and a funny one.", "Fine.", "It fell apart on the second day and nobody cared.", "Cold.", "The bed was lovely."]
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
"""Two processes, which the environment puts on the CPU; `--cpu` has accelerate start one."""


def moved(model):
    return model.initial_parameters(3) + np.float32(0.02) * np.sin(np.arange(model.layout.size, dtype=np.float32))


def public_of(model):
    return model.encode(TEXTS, None, [0, 1, 0, 1, 0])


@pytest.fixture
def launched(monkeypatch):
    """This process as if `accelerate launch --cpu` had started it; accelerate keeps its state for a whole process."""

    def launch(precision):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        return accelerated.processes()

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerated.processes.cache_clear()
    yield launch
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerated.processes.cache_clear()


@pytest.mark.parametrize("config", [TINY, NEXT], ids=["classes", "next tokens"])
def test_one_process_under_accelerate_has_the_gradient_of_one_without_it(config, launched):
    model = models.load(config, 2)
    public, theta, chosen = public_of(model), moved(model), [(np.array([4, 0, 2]), None), (np.array([1]), None)]
    found = Accelerated(launched("no"), model, public)(theta, chosen)
    for (gradient, loss), (plain, own) in zip(found, BackPropagation(model, public)(theta, chosen), strict=True):
        assert np.abs(gradient).max() > 1e-3
        assert (gradient.tobytes(), loss) == (plain.tobytes(), own)


def test_mixed_precision_moves_the_clouds_gradient_and_nothing_else(launched):
    """bfloat16 has eight bits, so that a gradient is off by about 2⁻⁸ times the root of the operations that it came through."""
    model = models.load(TINY, 2)
    public, theta, chosen = public_of(model), moved(model), [(np.arange(5), None)]
    ((exact, _),) = BackPropagation(model, public)(theta, chosen)
    kept = {index: state.clone() for index, state in public.states.items()}
    ((rounded, _),) = Accelerated(launched("bf16"), model, public)(theta, chosen)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.1
    assert kept
    assert all(torch.equal(public.states[index], state) for index, state in kept.items())
    ((again, _),) = BackPropagation(model, public)(theta, chosen)
    assert again.tobytes() == exact.tobytes()


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpoints"])
@pytest.mark.parametrize("objective", list(Objective), ids=lambda objective: objective.value)
def test_whatever_enters_a_network_that_was_moved_to_another_device_follows_it(objective, checkpoints):
    """The device is PyTorch's own for shapes without numbers, which needs no hardware."""
    words = ("bad", "good") if objective is not Objective.LABEL_TEXTS else ("a bad film", "a good one")
    model = models.load(replace(TINY, objective=objective, label_words=words), 2)
    public, theta = public_of(model), torch.from_numpy(moved(model)).requires_grad_()
    model.network.to("meta")
    model.network.get_submodule("backbone").get_base_model().set_attn_implementation("eager")  # the other one asks the mask for a number
    met = set()

    def meets(module, args, kwargs):
        given = [value for value in (*args, *kwargs.values(), *module.parameters(recurse=False)) if isinstance(value, torch.Tensor)]
        met.update(value.device.type for value in given)

    for module in model.network.modules():
        module.register_forward_pre_hook(meets, with_kwargs=True)
    with model.checkpointed() if checkpoints else nullcontext():
        scores = model.scores(theta, model.batch(public, range(5)))
    assert met == {"meta"}
    assert scores.device.type == "meta"
    assert scores.requires_grad


def test_on_another_device_the_clouds_network_is_one_of_its_own(launched):
    """Evaluation and simulated devices compute with the run's; a process that only back-propagates moves the one that it has."""
    model, alone = models.load(TINY, 2), launched("no")
    alone.device = torch.device("meta")
    own = alone.back_propagation(model, public_of(model), is_shared=True)
    assert {tensor.device.type for tensor in own._model.network.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in model.network.parameters()} == {"cpu"}
    assert alone.back_propagation(model, public_of(model), is_shared=False)._model is model


def test_runs_side_by_side_are_refused_where_accelerate_launched_one(launched, tmp_path):
    assert launched("no").count == 1
    with pytest.raises(ConfigError, match="processes: found 2 under `accelerate launch`, expected 1"):
        cooperllm.compare([cooperllm.recipe("tiny").config], tmp_path / "runs", processes=2)
    assert not (tmp_path / "runs").exists()


def test_several_processes_of_which_none_answers_are_refused(launched):
    model = models.load(TINY, 2)
    alone = launched("no")
    alone.count = 2
    with pytest.raises(ConfigError, match=r"found 2 processes, expected one: several need `with accelerated.together\(\):`"):
        Accelerated(alone, model, public_of(model))(moved(model), [(np.arange(2), None)])


WHOLE, ALONE = np.array([2, 1, 4, 3, 0]), np.array([3])
PROGRAM = """
from dataclasses import replace
import numpy as np
import torch
import test_accelerate as test
import cooperllm
from cooperllm import accelerated, models
from cooperllm.accelerated import Accelerated
from cooperllm.config import ArmName

torch.set_num_threads(1)
with accelerated.together():
    model = models.load(test.NEXT, 2)
    public, theta = test.public_of(model), test.moved(model)
    differentiate = Accelerated(accelerated.processes(), model, public)
    for number, batches in enumerate(([(test.WHOLE, None)], [(test.ALONE, None)], test.labelled(public))):
        found = differentiate(theta, batches)
        np.savez(f"{number}.npz", gradients=np.stack([one for one, _ in found]), losses=[loss for _, loss in found])
    config = replace(cooperllm.recipe("tiny").with_arm(ArmName.MEASURED), num_rounds=2)
    cooperllm.run(config, "run")
"""


def targets_of(public, chosen):
    """Of next tokens all but the first of each text, which nothing comes before."""
    return sum(len(public.token_ids[index]) - 1 for index in chosen)


def labelled(public):
    """Batches as a basis has them, of one text and other labels than its own; an odd number of them."""
    return [(np.array([index]), np.full(targets_of(public, [index]), 7 + index)) for index in (0, 1, 2)]


def environment_of(place, **others):
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join([tests, os.path.dirname(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    plain = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HOME": str(place / "no-configuration")}
    return os.environ | plain | others


def launch(place, *program):
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--main_process_port", "0", *program]
    return subprocess.run(command, cwd=place, env=environment_of(place), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes that accelerate launched come to."""
    place = tmp_path_factory.mktemp("two")
    (place / "program.py").write_text(PROGRAM)
    ended = launch(place, "program.py")
    assert ended.returncode == 0, ended.stderr
    return place


def found_by_two(place, number):
    found = np.load(place / f"{number}.npz")
    return found["gradients"], found["losses"].tolist()


def test_two_processes_have_the_mean_of_one_by_what_each_has_to_predict(two_processes):
    """To the bit it is that of the parts. Whole, an entry is a chain of about ten operations in each of two layers and the scores', with
    sums of at most 300 terms: some hundred roundings of 2⁻²⁴ of the largest entry. Parts of equal weight would be far off."""
    model = models.load(NEXT, 2)
    public, theta = public_of(model), moved(model)
    alone = BackPropagation(model, public)
    parts = [WHOLE[:3], WHOLE[3:]]
    shares = [np.float32(targets_of(public, part) / targets_of(public, WHOLE)) for part in parts]
    (first, first_loss), (second, second_loss), (whole, loss) = alone(theta, [*((part, None) for part in parts), (WHOLE, None)])
    (found,), (its_loss,) = found_by_two(two_processes, 0)
    assert found.tobytes() == (shares[0] * first + shares[1] * second).tobytes()
    assert its_loss == pytest.approx(shares[0] * first_loss + shares[1] * second_loss, rel=2**-22)
    tolerance = 300 * 2.0**-24 * np.abs(whole).max()
    assert np.abs(found - whole).max() < tolerance
    assert its_loss == pytest.approx(loss, rel=300 * 2.0**-24)
    assert np.abs((first + second) / 2 - whole).max() > 100 * tolerance


def test_a_batch_with_nothing_for_the_second_process_is_that_of_one(two_processes):
    model = models.load(NEXT, 2)
    ((gradient, loss),) = BackPropagation(model, public_of(model))(moved(model), [(ALONE, None)])
    (found,), (its_loss,) = found_by_two(two_processes, 1)
    assert (found.tobytes(), its_loss) == (gradient.tobytes(), loss)


def test_batches_that_are_dealt_out_come_back_in_their_order_with_the_bits_of_one(two_processes):
    model = models.load(NEXT, 2)
    public = public_of(model)
    alone = BackPropagation(model, public)(moved(model), labelled(public))
    found, losses = found_by_two(two_processes, 2)
    assert [one.tobytes() for one in found] == [gradient.tobytes() for gradient, _ in alone]
    assert losses == [loss for _, loss in alone]


def test_a_run_whose_cloud_is_two_processes_is_replayed_bit_for_bit(two_processes):
    files = RunDirectory(two_processes / "run")
    assembly = assemble(files)
    replica = assembly.start
    for update in files.updates():
        replica = replay.apply(replica, update, assembly.config.optimizer)
    assert replica.model_version == 2
    assert files.rounds()[0]["public_loss"] > 0


def begun(place, count, *program):
    """Processes as a launcher starts them, without one that would end those that are left."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "cooperllm", *program]
    for index in range(count):
        environment = environment_of(place, **common, RANK=str(index), LOCAL_RANK=str(index))
        yield subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def words_of(running):
    """What processes say on their error streams, and how they end; one that does not end is killed."""
    try:
        return [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


def test_a_mistake_of_the_users_is_one_sentence_and_the_other_process_goes_home(tmp_path):
    (words, status), other = words_of(list(begun(tmp_path, 2, "run", "tiny", "--model", "no/such-model", "--arm", "measured")))
    assert status == 1
    assert "ConfigError: model.name: 'no/such-model' could not be loaded" in words
    assert other == ("", 0)


def test_when_a_process_is_killed_the_others_say_so_and_end(tmp_path):
    running = list(begun(tmp_path, 3, "run", "tiny", "--arm", "measured", "--rounds", "100000", "--out", "run"))
    rounds, deadline = tmp_path / "run" / "rounds.jsonl", time.monotonic() + 120
    while not (rounds.exists() and rounds.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    running[2].kill()
    (first, status), (second, other_status), _ = words_of(running)
    assert (status, other_status) == (1, 1), first + second
    assert "LinkError: accelerate: one of processes 1 to 2 is gone" in first
    assert "LinkError: accelerate: process 0 is gone" in second
