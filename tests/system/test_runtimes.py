"""One contract for all runtimes, PyTorch, ONNX Runtime and OpenVINO, and what a device package refuses.

Run: pytest tests/system/test_runtimes.py
"""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import cooperllm
from cooperllm.algorithm import noise, replay, zeroth_order
from cooperllm.algorithm.maps import unpack_maps
from cooperllm.algorithm.rounding import half_step
from cooperllm.assembly import Material, assemble, write_device_package
from cooperllm.cli import app
from cooperllm.cloud import MapFitter
from cooperllm.config import (
    AdapterKind,
    ArmConfig,
    ArmName,
    EngineName,
    Objective,
    RunConfig,
    RuntimeName,
    SlopeMethod,
    SourceConfig,
    Variant,
)
from cooperllm.deployment.device_process import read_texts
from cooperllm.device import graphs
from cooperllm.device.manifest import LOSSES, OBSERVE, PULL_BACK, SLOPES
from cooperllm.device.onnx_forward import OnnxForward, open_package
from cooperllm.device.runtime import DIRECTIONS_PER_PASS, Runtime, Trainer
from cooperllm.device.settings import GraphLibrary, Settings
from cooperllm.device.torch_forward import TorchForward
from cooperllm.errors import ConfigError, PackageError
from cooperllm.run_directory import RunDirectory

CHOSEN = list(range(8))
NAMES = ["torch", "onnx", "openvino"]
IA3 = "--adapter ia3 --target-modules k_proj,v_proj --set model.objective=head --set model.last_layers=null --set model.label_words=[]"


# Seen of a model of 260 000 parameters, whose few weights round badly: cosines of .998, .998 and .862; of MiniLM .997, .9996 and .97.
WORST_COSINE = {Variant.INT8: 0.98, Variant.INT8_WEIGHTS: 0.99, Variant.INT4: 0.8}
# Correlations of .984, .99995 and .995: estimates in 4 bits have codes of their own for Wᵀ. At μ = .001 int8 came to .785.
WORST_CORRELATION = {Variant.INT8: 0.9, Variant.INT8_WEIGHTS: 0.999, Variant.INT4: 0.98}


def tiny(runtime, arm=ArmName.FEEDBACK):
    """Estimates travel exactly: at 8 bits a last bit turns roundings over, and Adam makes whole steps of entries near zero."""
    config = replace(cooperllm.recipe("tiny").with_arm(arm), engine=EngineName.LOOPBACK, runtime=runtime)
    return replace(config, arm=replace(config.arm, estimate_bits=32, step_bits=32))


@pytest.fixture(scope="module")
def onnx_run(tmp_path_factory):
    """A whole run whose devices never touch PyTorch; its package serves the other tests, forward mode and all."""
    config = replace(tiny(RuntimeName.ONNX), slope_method=SlopeMethod.FORWARD_MODE)
    return cooperllm.run(config, tmp_path_factory.mktemp("onnx") / "run")


def write(config, path, variant=Variant.FP32):
    """Writes a package that has forward mode, too; returns what it was given."""
    write_device_package(replace(config, slope_method=SlopeMethod.FORWARD_MODE), Material(config), path, variant)
    return config, path


def label_words(onnx_run, _directory):
    """A causal language model, all layers adapted."""
    return tiny(RuntimeName.ONNX), onnx_run.path / "package"


def ia3_with_head(_onnx_run, directory):
    """IA3 on all layers, so that token ids enter the graphs, and a trained head; written by the command line."""
    path = directory / "package"
    result = CliRunner().invoke(app, ["package", str(path), "--recipe", "tiny", "--slopes", "forward-mode", *IA3.split()])
    assert result.exit_code == 0, result.output
    assert "MiB" in result.output
    config = tiny(RuntimeName.ONNX)
    model = replace(
        config.model,
        adapter=AdapterKind.IA3,
        target_modules=("k_proj", "v_proj"),
        objective=Objective.HEAD,
        last_layers=None,
        label_words=(),
    )
    return replace(config, model=model), path


def next_tokens(_onnx_run, directory):
    """A causal language model that learns what is to be said: the whole vocabulary, at every token of a completion."""
    config = tiny(RuntimeName.ONNX)
    model = replace(config.model, objective=Objective.NEXT_TOKEN, prompt="{text} This is about", label_words=())
    source = replace(config.data.private, completion_column="domain")
    return write(replace(config, model=model, data=replace(config.data, public=source, private=source)), directory / "package")


def last_layer_alone(_onnx_run, directory):
    """Nothing lies below the last adapted layer, so that there is nothing to map: every gradient is exact. Label words are calibrated."""
    config = tiny(RuntimeName.ONNX)
    return write(replace(config, model=replace(config.model, last_layers=1, calibrates=True)), directory / "package")


def default_model(_onnx_run, directory, variant=Variant.FP32):
    """MiniLM as the demo has it."""
    data = replace(
        RunConfig().data, public=SourceConfig(max_examples=64), private=SourceConfig(max_examples=48), num_test=2, num_validation=2
    )
    return write(replace(cooperllm.recipe("demo").config, data=data), directory / "package", variant)


@pytest.fixture(
    scope="module", params=[label_words, next_tokens, last_layer_alone, ia3_with_head, default_model], ids=lambda make: make.__name__
)
def pair(request, tmp_path_factory):
    """The same device by each runtime, at a θ where every gradient is alive."""
    config, path = request.param(request.getfixturevalue("onnx_run"), tmp_path_factory.mktemp("pair"))
    material, package = Material(config), open_package(path)
    model, texts = material.model, material.task.private
    examples = package.encode(texts.texts, texts.second_texts, texts.labels, texts.completions)
    shard = range(3, 3 + 2 * len(CHOSEN))
    runtimes = {
        "torch": TorchForward(model, material.private, shard, None, 1.0),
        "onnx": OnnxForward(package, examples, shard, None, 1.0),
        "openvino": OnnxForward(open_package(path, Settings(library=GraphLibrary.OPENVINO)), examples, shard, None, 1.0),
    }
    theta = package.theta + 0.02 * np.sin(np.arange(len(package.theta), dtype=np.float32))
    fitter = MapFitter(model, material.public, num_examples=32, num_components=8, rank=8, bits=8, most_blocks=2)
    has_maps = fitter.has_texts and config.model.objective is not Objective.NEXT_TOKEN
    maps = unpack_maps([fitter.fit(theta, 1, 1)], *runtimes["onnx"].map_shape) if has_maps else None
    return SimpleNamespace(material=material, package=package, examples=examples, runtimes=runtimes, theta=theta, maps=maps, **runtimes)


def directions(pair, count):
    return [noise.gaussian(5, index, len(pair.theta)) for index in range(count)]


def points(pair, count):
    return np.stack([pair.theta + np.float32(0.01) * z for z in directions(pair, count)])


def gradient_of(pair):
    """Back-propagation through everything."""
    model, batch = pair.material.model, pair.material.model.batch(pair.material.private, [3 + index for index in CHOSEN])
    point = torch.from_numpy(pair.theta.copy()).requires_grad_()
    scores = model.scores(point, batch) + torch.from_numpy(pair.onnx._shift)
    return torch.autograd.grad(torch.nn.functional.cross_entropy(scores, batch.labels), point)[0].numpy()


@pytest.fixture(scope="module")
def int8_and_exact(tmp_path_factory):
    """MiniLM with int8 weights, and what 50 derivatives are."""
    path = tmp_path_factory.mktemp("int8")
    config, where = default_model(None, path, Variant.INT8)
    material, package = Material(config), open_package(where)
    examples, theta = package.encode(material.task.private.texts, None, material.task.private.labels), package.theta
    theta = theta + 0.02 * np.sin(np.arange(len(theta), dtype=np.float32))
    probes = [noise.gaussian(6, index, len(theta)) for index in range(50)]
    reference = TorchForward(material.model, material.private, range(len(CHOSEN)), None)
    exact = np.stack(probes) @ reference_gradient(reference, theta)
    return OnnxForward(package, examples, range(len(CHOSEN)), None), exact, theta, probes


def reference_gradient(reference, theta):
    """A step of one is the gradient."""
    return theta - reference.train(theta, [CHOSEN], 1.0)[0]


# What all give.


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_keeps_the_seam_and_only_pytorch_back_propagates(pair, name):
    assert isinstance(pair.runtimes[name], Runtime)
    assert isinstance(pair.runtimes[name], Trainer) is (name == "torch")
    assert pair.runtimes[name].num_examples == 2 * len(CHOSEN)


def test_both_read_texts_as_the_same_tokens(pair):
    assert [row.tolist() for row in pair.examples.token_ids] == [row.tolist() for row in pair.material.private.token_ids]
    long = "a long and winding sentence about nothing " * 99
    for said in ("one word", long, None):  # for next tokens
        given = ([long], ["another one"], [1], None if said is None else [said])
        found = pair.package.encode(*given).token_ids[0]
        assert found.tolist() == pair.material.model.encode(*given).token_ids[0].tolist()
        assert len(found) <= pair.package.manifest.max_tokens


def test_texts_that_find_no_room_are_cut_and_counted(pair):
    long = "a long and winding sentence about nothing " * 99
    assert pair.package.encode([long, "short", long], None, [0, 1, 0]).num_cut == 2
    assert pair.package.encode(["short"], None, [0]).num_cut == 0
    if pair.package.manifest.frame is None:
        assert pair.package.encode(["short", "short"], ["short", long], [0, 1]).num_cut == 1
    else:
        assert pair.package.encode(["short", "short"], None, [], ["short", long]).num_cut == 1


def test_a_devices_own_file_of_texts_gives_the_same_examples(pair, tmp_path):
    """With labels by name, or with completions."""
    texts, names = pair.material.task.private, pair.package.manifest.label_names
    rows = [{"text": text} for text in texts.texts[:9]]
    for row, label, said in zip(rows, texts.labels, texts.completions or texts.texts, strict=False):
        row |= {"label": names[label]} if names else {"completion": said}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_texts(tmp_path / "texts.jsonl", pair.package)
    assert [row.tolist() for row in found.token_ids] == [row.tolist() for row in pair.examples.token_ids[:9]]
    assert found.labels.tolist() == pair.examples.labels[:9].tolist()
    if not names:
        assert found.starts.tolist() == pair.examples.starts[:9].tolist()
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "no completion"}]))
        with pytest.raises(ConfigError, match="found 10 texts, 0 with text2, 9 with completion, expected"):
            read_texts(tmp_path / "texts.jsonl", pair.package)


def test_losses_agree(pair):
    found = [runtime.evaluate(CHOSEN)[0](points(pair, 3)) for runtime in pair.runtimes.values()]
    # Float32 losses near 1 have steps of 1.2e-7; a pass adds up some hundred terms.
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-6)
    assert np.ptp(found[0]) > 1e-4


def test_slopes_agree_relative_to_the_gradient(pair):
    found = [
        zeroth_order.slopes(runtime.evaluate(CHOSEN)[0], pair.theta, directions(pair, 4), 0.1, points_per_pass=2)
        for runtime in pair.runtimes.values()
    ]
    length = np.linalg.norm(gradient_of(pair))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5 * length)
    assert np.abs(found[0]).max() > 0.01 * length


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_forward_mode_gives_the_gradients_projections_and_the_loss_at_theta(pair, name):
    """Five directions and then one: the graph was traced with another number of each size."""
    runtime, gradient = pair.runtimes[name], gradient_of(pair)
    differentiate, most = runtime.differentiate(CHOSEN)
    assert most == DIRECTIONS_PER_PASS
    for probes in (np.stack(directions(pair, 5)), np.stack(directions(pair, 6))[5:]):
        loss, found = differentiate(pair.theta, probes)
        # |z| is near √n; a dot product of n float32 terms of that size has an error of some 1e-7 |g|√n.
        np.testing.assert_allclose(found, probes @ gradient, atol=1e-5 * np.linalg.norm(gradient))
        assert loss == pytest.approx(runtime.evaluate(CHOSEN)[0](pair.theta[None])[0], abs=2e-6)


def products(package, name):
    """How often a graph multiplies with a frozen matrix, as it is or turned."""
    graph = onnx.load(package.path / f"{name}.onnx", load_external_data=False).graph
    frozen = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) >= 16}
    return sum(node.op_type in {"MatMul", "FusedMatMul"} and node.input[1] in frozen for node in graph.node)


def test_forward_mode_multiplies_with_each_frozen_matrix_once(pair):
    """As many products as a pass without tangents has: values are not computed again for each direction."""
    assert products(pair.package, LOSSES) == products(pair.package, SLOPES) > 2


def test_an_estimate_differentiates_each_layer_once(pair):
    """The first pass goes back through scores and the last layer alone, the second runs every layer below once more and back."""
    below, forward = len(pair.package.manifest.layers), products(pair.package, LOSSES)
    for_scores = 0 if pair.package.manifest.frame is None else 1  # the rows of label words are a matrix too small to be counted
    layers = forward - for_scores
    assert forward < products(pair.package, OBSERVE) <= forward + layers / (below + 1) + for_scores
    if below:
        assert products(pair.package, PULL_BACK) <= 2 * layers * below / (below + 1)


def test_a_memory_budget_decides_how_many_directions_share_a_pass(pair):
    """A pass holds the loss's own values and one set of tangents a direction."""
    longest = max(len(pair.examples.token_ids[3 + index]) for index in CHOSEN)
    one = pair.package.manifest.widths.activation_mib(1, longest)
    for budget, expected in ((0.5 * one, 1), (2.5 * one, 1), (3.5 * one, 2), (9.5 * one, 8)):
        device = OnnxForward(pair.package, pair.examples, pair.onnx.shard, budget, 1.0)
        differentiate, most = device.differentiate(CHOSEN)
        assert most == expected
        probes = np.stack(directions(pair, 3))
        np.testing.assert_allclose(
            differentiate(pair.theta, probes)[1], pair.onnx.differentiate(CHOSEN)[0](pair.theta, probes)[1], rtol=1e-3
        )


@pytest.mark.parametrize("has_maps", [False, True])
def test_estimates_agree(pair, has_maps):
    (first, loss), *others = (pair.runtimes[name].estimate(pair.theta, CHOSEN, pair.maps if has_maps else None) for name in NAMES)
    for second, other in others:
        assert loss == pytest.approx(other, abs=2e-6)
        assert np.linalg.norm(first - second) <= 1e-5 * np.linalg.norm(first)
    assert np.abs(first).max() > 1e-4


def test_from_the_last_layer_on_estimates_are_gradients(pair):
    expected = gradient_of(pair)
    exact = slice(pair.package.manifest.exact_start, None)
    assert 0 <= exact.start < len(expected)
    for name in NAMES:
        found = pair.runtimes[name].estimate(pair.theta, CHOSEN, None)[0]
        assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected)
        assert np.linalg.norm(found[exact] - expected[exact]) <= 1e-5 * np.linalg.norm(expected)


# What each keeps.


@pytest.mark.parametrize("name", NAMES)
def test_one_point_and_several_in_a_pass_agree(pair, name):
    losses = pair.runtimes[name].evaluate(CHOSEN)[0]
    several = points(pair, 5)
    for count in (1, 2):
        # Kernels add up in another order for another number of rows.
        np.testing.assert_allclose(losses(several[:count]), losses(several)[:count], atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_the_mean_of_its_targets_losses(pair, name):
    """Of one class for each example, or of all tokens to be said."""
    runtime = pair.runtimes[name]
    alone = [runtime.evaluate([index])[0](pair.theta[None])[0] for index in CHOSEN]
    counts = [pair.examples.num_targets([3 + index]) for index in CHOSEN]
    assert runtime.evaluate(CHOSEN)[0](pair.theta[None])[0] == pytest.approx(np.average(alone, weights=counts), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_never_moves_what_it_is_given(pair, name):
    runtime, given, theta = pair.runtimes[name], points(pair, 2), pair.theta.copy()
    before = given.tobytes(), theta.tobytes()
    given.flags.writeable = theta.flags.writeable = name == "torch"  # PyTorch warns of arrays that it must not write to
    runtime.evaluate(CHOSEN)[0](given)
    first = runtime.estimate(theta, CHOSEN, pair.maps)[0]
    assert (given.tobytes(), theta.tobytes()) == before
    assert runtime.estimate(theta, CHOSEN, pair.maps)[0].tobytes() == first.tobytes()


def test_both_say_of_the_same_layers_that_they_need_maps(pair):
    adapted = pair.material.model.adapted
    assert pair.torch.map_shape == pair.onnx.map_shape == (len(adapted.below), adapted.width)
    assert pair.package.manifest.exact_start == adapted.exact_start


def test_a_memory_budget_decides_how_passes_are_cut_and_changes_nothing(pair):
    widths, given = pair.package.manifest.widths, points(pair, 2)
    small, large = (
        OnnxForward(pair.package, pair.examples, pair.onnx.shard, budget, 1.0).evaluate(CHOSEN)
        for budget in (widths.activation_mib(1, 8), 4 * widths.activation_mib(1, pair.package.manifest.max_tokens))
    )
    assert (small[1], pair.onnx.evaluate(CHOSEN)[1]) == (1, 1)
    assert large[1] >= 4
    np.testing.assert_allclose(small[0](given), large[0](given), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_budget_cuts_an_estimate_in_parts_and_changes_nothing(pair, name):
    """A budget for no more than one text: every text has a pass of its own."""
    whole, budget = pair.runtimes[name], pair.package.manifest.widths.activation_mib(1, 8)
    arguments = (pair.material.model, pair.material.private) if name == "torch" else (whole._package, pair.examples)
    parts = type(whole)(*arguments, whole.shard, budget, 1.0)
    (expected, loss), (found, other) = (runtime.estimate(pair.theta, CHOSEN, pair.maps) for runtime in (whole, parts))
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)  # padding moves scores by some 1e-5
    assert loss == pytest.approx(other, abs=1e-5)


def test_what_does_not_fit_the_package_is_refused_in_a_sentence(pair):
    with pytest.raises(ConfigError, match=r"theta: found 3 parameters, the package .* has \d+"):
        pair.onnx.evaluate(CHOSEN)[0](np.zeros((1, 3), np.float32))
    wrong = ("labels: found 1 of", [2], None) if pair.package.manifest.frame is None else ("text 0: found ''", [], [""])
    if pair.package.manifest.frame is None or not pair.package.manifest.frame.end:
        with pytest.raises(ConfigError, match=wrong[0]):
            pair.package.encode(["a text"], None, *wrong[1:])
    with pytest.raises(ConfigError, match="shard: found no examples"):
        OnnxForward(pair.package, pair.examples, [], None)


# Whole runs.


def test_a_run_on_onnx_runtime_follows_the_path_of_the_reference(onnx_run, tmp_path):
    reference = cooperllm.run(tiny(RuntimeName.TORCH), tmp_path / "run")
    paths = []
    for run in (onnx_run, reference):
        files = RunDirectory(run.path)
        replica, path = assemble(files).start, []
        for update in files.updates():
            replica = replay.apply(replica, update, files.config().optimizer)
            path.append(replica.theta)
        paths.append(np.stack(path))
    moved = np.linalg.norm(paths[1] - assemble(RunDirectory(reference.path)).start.theta, axis=1)
    # Float32 sums in another order, 1e-5 of a gradient apart, and Adam magnifies entries near zero; 2e-6 of the way was seen.
    assert (np.linalg.norm(paths[0] - paths[1], axis=1) < 1e-3 * moved).all()
    assert onnx_run.summary["arms"]["feedback"]["forward_passes"] == reference.summary["arms"]["feedback"]["forward_passes"]


@pytest.mark.parametrize("runtime", ["torch", "onnx-int8"])
def test_a_run_in_forward_mode_ends_and_counts_what_it_ran(runtime, tmp_path):
    path, options = tmp_path / "run", "run tiny --arm measured --engine loopback --slopes forward-mode --runtime"
    result = CliRunner().invoke(app, [*options.split(), runtime, "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert RunDirectory(path).config().slope_method is SlopeMethod.FORWARD_MODE
    for row in RunDirectory(path).rounds():
        # All of a device's directions, four to a pass, and each pass's own values.
        passes = row["queries"] + math.ceil(row["queries"] / DIRECTIONS_PER_PASS)
        assert row["forward_passes"] == passes * row["num_reports"] < 2 * row["queries"] * row["num_reports"]


def test_forward_mode_with_int8_weights_keeps_the_direction_of_exact_derivatives(int8_and_exact):
    """50 Gaussian directions."""
    device, exact, theta, probes = int8_and_exact
    differentiate, most = device.differentiate(CHOSEN)
    found = zeroth_order.derivatives(differentiate, theta, probes, directions_per_pass=most)
    assert np.corrcoef(found, exact)[0, 1] >= 0.99


def test_a_package_without_forward_mode_is_refused_in_a_sentence(quantised):
    """Nobody asked for it when the run wrote its package."""
    opened = open_package(quantised.run.path / "package")
    assert SLOPES not in opened.manifest.graphs
    device = OnnxForward(opened, opened.encode(["a fine film"], None, [1]), [0], None)
    assert np.isfinite(device.evaluate([0])[0](opened.theta[None])).all()
    with pytest.raises(ConfigError, match=r"slope_method: found forward-mode and a package without it .* expected two-sided"):
        device.differentiate([0])


@pytest.fixture(scope="module", params=[RuntimeName.ONNX_INT8, RuntimeName.ONNX_INT8_WEIGHTS, RuntimeName.ONNX_INT4], ids=lambda r: r.value)
def quantised(request, tmp_path_factory):
    """A whole run whose devices keep weights in few bits, and PyTorch beside one of its devices."""
    config = replace(tiny(request.param), num_rounds=2)
    run = cooperllm.run(config, tmp_path_factory.mktemp(request.param.value) / "run")
    material, package, shard = Material(config), open_package(run.path / "package"), list(range(len(CHOSEN)))
    texts = material.task.private
    onnx = OnnxForward(package, package.encode(texts.texts, texts.second_texts, texts.labels), shard, None, 1.0)
    exact = TorchForward(material.model, material.private, shard, None, 1.0)
    theta = package.theta + 0.02 * np.sin(np.arange(len(package.theta), dtype=np.float32))
    manifest = package.manifest
    return SimpleNamespace(variant=manifest.variant, start=manifest.exact_start, run=run, onnx=onnx, torch=exact, theta=theta)


def cosine(first, second):
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_a_run_on_few_bits_takes_part_as_any_other(quantised, onnx_run):
    summary = quantised.run.summary["arms"]["feedback"]
    rounds = [len(list(RunDirectory(run.path).updates())) for run in (quantised.run, onnx_run)]
    assert rounds[0] == 2
    assert summary["forward_passes"] * rounds[1] == onnx_run.summary["arms"]["feedback"]["forward_passes"] * rounds[0]
    size, whole = ((run.path / "package" / "weights.bin").stat().st_size for run in (quantised.run, onnx_run))
    assert size < whole


def test_estimates_in_few_bits_point_the_same_way(quantised):
    found, expected = (runtime.estimate(quantised.theta, CHOSEN, None)[0] for runtime in (quantised.onnx, quantised.torch))
    assert cosine(found, expected) >= WORST_COSINE[quantised.variant]


def test_slopes_in_few_bits_are_those_of_their_own_estimate(quantised):
    """Along directions of the last layer, where estimates are exact gradients, at the half-step that a device takes for a plan's .001."""
    estimate = quantised.onnx.estimate(quantised.theta, CHOSEN, None)[0]
    last = np.arange(len(estimate)) >= quantised.start
    directions = [noise.gaussian(5, index, len(estimate)) * last for index in range(8)]
    mu = half_step(quantised.onnx.rounding(), 1e-3, ArmConfig().signal_to_noise)
    assert (mu > 1e-3) == (quantised.variant is Variant.INT8)
    found = zeroth_order.slopes(quantised.onnx.evaluate(CHOSEN)[0], quantised.theta, directions, mu, points_per_pass=1)
    assert np.corrcoef(found, [estimate @ z for z in directions])[0, 1] >= WORST_CORRELATION[quantised.variant]


def test_back_propagation_on_devices_needs_pytorch():
    with pytest.raises(ConfigError, match=r"runtime: found 'onnx', expected torch for the arm fedavg-bp"):
        tiny(RuntimeName.ONNX, ArmName.FEDAVG_BP)


ALONE = """
import sys
import numpy as np
import cooperllm.device
from cooperllm.device.onnx_forward import OnnxForward, open_package
from cooperllm.device.settings import GraphLibrary, Settings
package = open_package(sys.argv[1], Settings(library=GraphLibrary(sys.argv[2])))
device = OnnxForward(package, package.encode(["a fine film", "a bad one"], None, [1, 0]), [0, 1], None, 1.0)
print(device.evaluate([0, 1])[0](np.stack([package.theta, package.theta])).tolist())
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "datasets", "onnx", "safetensors",
"onnxruntime", "openvino"}))
"""


@pytest.mark.parametrize("library", list(GraphLibrary))
def test_a_device_has_never_imported_pytorch_nor_a_library_that_it_does_not_use(onnx_run, library):
    command = [sys.executable, "-c", ALONE, str(onnx_run.path / "package"), library.value]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"['{library.value}']"


@pytest.mark.parametrize("library", list(GraphLibrary))
def test_a_square_weight_can_be_multiplied_both_ways_in_one_graph(library, tmp_path):
    """OpenVINO 2026.4, left to itself, packs it once and computes one of the products with the wrong side of it."""
    weight = noise.gaussian(5, 0, 64).reshape(8, 8)
    given = {name: noise.gaussian(5, number, 24).reshape(3, 8) for number, name in enumerate(("x", "y"), 1)}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "weight"], ["forward"]),
        onnx.helper.make_node("FusedMatMul", ["y", "weight"], ["backward"], domain="com.microsoft", transB=1),
    ]
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, 1, [None, 8]) for name in names] for names in (given, ("forward", "backward"))
    )
    graph = onnx.helper.make_graph(nodes, "both", inputs, outputs, [onnx.numpy_helper.from_array(weight, "weight")])
    versions = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=versions, ir_version=10), tmp_path / "both.onnx")
    found = graphs.loader(library)(tmp_path / "both.onnx", Settings(library=library), 1, {}).run(given)
    np.testing.assert_allclose(found["forward"], given["x"] @ weight, atol=1e-5)
    np.testing.assert_allclose(found["backward"], given["y"] @ weight.T, atol=1e-5)


@pytest.mark.parametrize("library", list(GraphLibrary))
def test_a_graph_that_a_library_cannot_read_is_refused_with_its_name_and_version(package, library):
    """The manifest agrees with the file, so that only the library can tell."""
    content = b"no graph at all"
    (package / "losses.onnx").write_bytes(content)
    files = json.loads((package / "manifest.json").read_text())["files"]
    edit(package, files=files | {"losses.onnx": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})
    with pytest.raises(PackageError, match=rf"losses.onnx does not run in {library.value} [0-9.]+"):
        open_package(package, Settings(library=library))


@pytest.mark.parametrize("arm", [ArmName.MEASURED, ArmName.FEEDBACK])
def test_a_run_on_openvino_writes_a_package_and_goes_as_one_on_onnx_runtime_does(onnx_run, arm, tmp_path):
    run, reference = (
        cooperllm.run(replace(tiny(runtime, arm), num_rounds=1), tmp_path / runtime.value)
        for runtime in (RuntimeName.OPENVINO, RuntimeName.TORCH)
    )
    (update, *_), (expected, *_) = (list(RunDirectory(one.path).updates()) for one in (run, reference))
    assert update.loss == pytest.approx(expected.loss, abs=2e-6)
    assert open_package(run.path / "package").manifest.golden == open_package(onnx_run.path / "package").manifest.golden


def test_a_library_that_is_not_installed_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "cooperllm.device.openvino_graph", raising=False)
    with pytest.raises(ConfigError, match=r"found no module 'openvino', expected openvino; pip install 'cooperllm\[openvino\]'"):
        open_package(package, Settings(library=GraphLibrary.OPENVINO))


# Packages that are not what they say.


@pytest.fixture
def package(onnx_run, tmp_path):
    return shutil.copytree(onnx_run.path / "package", tmp_path / "package")


def edit(package, **changes):
    manifest = json.loads((package / "manifest.json").read_text())
    (package / "manifest.json").write_text(json.dumps(manifest | changes))


FRAME, WRITES = {"prompt": "{text}", "start": [], "end": [1]}, {"prompt": "{text!r}"}


def spoken(package):
    golden = json.loads((package / "manifest.json").read_text())["golden"]
    return golden | {"labels": [], "completions": golden["texts"]}


def weight(**changes):
    return {"offset": 0, "kind": "float32", "shape": [16]} | changes


def cut(file, kept):
    file.write_bytes(file.read_bytes()[:kept])


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: flip(p / "weights.bin", 5000), "weights.bin: SHA-256 .* expected; copy the package again"),
        (lambda p: flip(p / "losses.onnx", 500), "losses.onnx: SHA-256"),
        (lambda p: cut(p / "weights.bin", 100), "weights.bin: 100 bytes found, [0-9]+ bytes expected"),
        (lambda p: (p / "observe.onnx").unlink(), "observe.onnx: no file found"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json does not exist: .* is not a device package"),
        (lambda p: cut(p / "manifest.json", 100), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_bytes(b" " * (1 << 20) + b"{}"), "at most 1048576 expected"),
        (lambda p: edit(p, format_version=0), "format version 0 found, 5 expected"),
        (lambda p: edit(p, num_classes=1 << 40), "manifest.json is damaged"),
        (lambda p: edit(p, num_parameters=7), "ranges .* of 7 parameters expected"),
        (lambda p: edit(p, graphs=["losses", "strange"]), "graphs .* expected"),
        (lambda p: edit(p, files={"../config.json": {"size": 1, "sha256": "0" * 64}}), "manifest.json is damaged"),
        (lambda p: edit(p, label_names=["one"]), "1 label names found, 2 expected"),
        (lambda p: edit(p, prompt="{text:999999999}"), "prompts .* nothing but {text} and {text2} expected"),
        (lambda p: edit(p, prompt="{text.__class__}"), "prompts .* nothing but {text} and {text2} expected"),
        (lambda p: edit(p, prompt="{text"), "prompts .* nothing but {text} and {text2} expected"),
        (lambda p: edit(p, objective="next-token"), "objective next-token and no frame found, a frame for next-token expected"),
        (lambda p: edit(p, frame=FRAME), "objective label-words and a frame found"),
        (lambda p: edit(p, objective="next-token", label_names=[], frame=FRAME), "golden labels .* found"),
        (lambda p: edit(p, objective="next-token", label_names=[], frame=FRAME | {"start": [-1]}), "manifest.json is damaged"),
        (lambda p: edit(p, objective="next-token", label_names=[], golden=spoken(p), frame=FRAME | WRITES), "prompts .* found"),
        (lambda p: edit(p, weights={"weight_0": weight(offset=1 << 40)}), "weight_0 found that ends behind byte [0-9]+ of weights.bin"),
        (lambda p: edit(p, weights={"weight_0": weight(shape=[1 << 31] * 8)}), "weight_0 found that ends behind byte"),
        (lambda p: edit(p, weights={"weight_0": weight(kind="object")}), "manifest.json is damaged"),
        (lambda p: edit(p, weights={"/etc/passwd": weight()}), "manifest.json is damaged"),
        (lambda p: edit(p, weights={"weight_0": weight(shape=[2])}), "onnx does not run in onnxruntime"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_what_it_says_is_refused(package, damage, sentence):
    damage(package)
    with pytest.raises(PackageError, match=sentence):
        open_package(package)


def test_a_machine_that_computes_other_losses_does_not_take_part(package):
    golden = json.loads((package / "manifest.json").read_text())["golden"]
    edit(package, golden=golden | {"losses": [loss + 2e-3 for loss in golden["losses"]]})
    with pytest.raises(PackageError, match=r"golden losses .* found, .* expected within 0.0001"):
        open_package(package)
    edit(package, golden=golden | {"token_ids": [row[:-1] for row in golden["token_ids"]]})
    with pytest.raises(PackageError, match="reads the golden texts as other tokens"):
        open_package(package)


def test_a_package_is_never_written_over_something(package):
    config = tiny(RuntimeName.ONNX)
    with pytest.raises(ConfigError, match="found something there"):
        write_device_package(config, Material(config), package, Variant.FP32)


def test_a_model_whose_every_parameter_is_trained_has_no_package(tmp_path):
    config = tiny(RuntimeName.ONNX, ArmName.MEASURED)
    config = replace(config, model=replace(config.model, adapter=AdapterKind.FULL))
    with pytest.raises(
        ConfigError, match=r"model\.adapter: found trained parameters in .* choose --adapter lora or ia3, or --runtime torch"
    ):
        write_device_package(config, Material(config), tmp_path / "package", Variant.FP32)
    assert list(tmp_path.iterdir()) == []
