"""The feedback guide on real networks: maps fitted to them, estimates judged by back-propagation, whole runs.

Run: pytest tests/system/test_feedback_guide.py
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sample_messages
import torch
from interruption import Interrupt, interrupt_after

import cooperllm
from cooperllm import data, models
from cooperllm.algorithm import feedback, noise, replay
from cooperllm.algorithm.compression import pack_vector, unpack_vector
from cooperllm.algorithm.guidance import digest
from cooperllm.algorithm.maps import unpack_maps
from cooperllm.assembly import assemble
from cooperllm.batches import Examples
from cooperllm.cloud import MapFitter
from cooperllm.config import (
    AdapterKind,
    ArmName,
    DataConfig,
    EngineName,
    FederationConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    OptimizerKind,
    SourceConfig,
)
from cooperllm.device.probe import run_device
from cooperllm.device.torch_forward import TorchForward
from cooperllm.errors import ConfigError, DivergenceError, ProtocolError, QuorumError
from cooperllm.link.codec import encode
from cooperllm.link.loopback import Loopback
from cooperllm.messages import Feedback, Order, Outcome
from cooperllm.round import run_round
from cooperllm.run_directory import RunDirectory
from cooperllm.tiers import LocalEdges

CHOSEN = list(range(16))
"""The private batch that estimates are made for."""


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def true_gradient(model, examples, theta, chosen=CHOSEN):
    point = torch.from_numpy(theta.copy()).requires_grad_()
    batch = model.batch(examples, chosen)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model.scores(point, batch), batch.labels), point)
    return gradient.numpy()


def after_training(config, learning_rate):
    """A model after six steps on other private texts, where gradients of the adapters are no longer zero, and maps fitted to it."""
    sources = {"public": SourceConfig(max_examples=96), "private": SourceConfig(max_examples=48)}
    task = data.load(DataConfig(**sources, num_test=2, num_validation=2), FederationConfig(), 0)
    model = models.load(config, 2)
    public, private = (model.encode(part.texts, None, part.labels) for part in (task.public, task.private))
    device = TorchForward(model, private, range(len(private)), None)
    theta, _ = device.train(model.initial_parameters(3), [[16 + (8 * i + j) % 32 for j in range(8)] for i in range(6)], learning_rate)
    fitter = MapFitter(model, public, num_examples=96, num_components=24, rank=24, bits=8, most_blocks=2)
    maps, gradient = fitter.fit(theta, 5, 6), true_gradient(model, private, theta)
    return SimpleNamespace(
        model=model,
        public=public,
        private=private,
        device=device,
        theta=theta,
        fitter=fitter,
        maps=maps,
        decoded=decoded(model, maps),
        gradient=gradient,
        mapped=slice(0, model.adapted.exact_start),
        exact=slice(model.adapted.exact_start, None),
    )


def decoded(model, *maps):
    return unpack_maps(maps, len(model.adapted.below), model.adapted.width)


@pytest.fixture(scope="module")
def trained():
    """MiniLM with a head and three adapted layers: two need maps, the last is exact."""
    return after_training(ModelConfig(last_layers=3), 0.5)


LABEL_TEXTS = ModelConfig(objective=Objective.LABEL_TEXTS, label_words=("a bad review", "a great review"))
LABEL_WORDS = cooperllm.recipe("tiny").config.model


@pytest.fixture(scope="module")
def compared():
    """MiniLM without a head; scores are not linear in the pooled state."""
    return after_training(LABEL_TEXTS, 0.1)


@pytest.fixture(scope="module")
def llama():
    """Label words: rotary embeddings, a final norm and the last token between the last layer and the scores."""
    return after_training(LABEL_WORDS, 0.1)


def asked(theta, blocks, maps_version, *, bits=32):
    """A plan for one device with this θ, and the replica it belongs to."""
    replica = replay.start(theta, OptimizerConfig())
    return sample_messages.plan(
        theta_hash=replica.state_hash,
        cohort=(0,),
        batch_size=len(CHOSEN),
        guide_hash=digest(np.zeros((0, len(theta)), np.float32)),
        feedback=Feedback(maps_version=maps_version, blocks=tuple(blocks), bits=bits, slope_scale=0.03),
    ), replica


def answered(trained, maps, blocks=None, maps_version=6, theta=None):
    """The report of a device whose shard is the batch."""
    blocks = trained.fitter.blocks if blocks is None else blocks
    plan, replica = asked(trained.theta if theta is None else theta, blocks, maps_version)
    device = TorchForward(trained.model, trained.private, CHOSEN, None)
    return run_device(Order(device_id=0, group=0, plan=plan, updates=(), snapshot=None), replica, device, None, maps)


# Estimates against back-propagation.


def test_maps_fitted_on_public_texts_give_the_gradient_of_private_ones(trained):
    found = trained.device.estimate(trained.theta, CHOSEN, trained.decoded)[0]
    assert cosine(found, trained.gradient) > 0.98
    # By chance two vectors of 12 288 numbers have a cosine near 0.01.
    for start, stop in trained.fitter.blocks:
        assert cosine(found[start:stop], trained.gradient[start:stop]) > 0.8


def test_maps_fitted_on_the_very_texts_give_the_gradient_of_every_factor():
    """51 features describe 25 tokens exactly; what is left is the ridge. A confusion of layers, factors or directions would show."""
    model = models.load(ModelConfig(last_layers=3), 3)
    examples = model.encode(["A stirring film.", "It fell apart quickly.", "Fine.", "Cold room, lovely bed."], None, [0, 2, 1, 1])
    theta = model.initial_parameters(3) + 0.02 * np.sin(np.arange(model.layout.size, dtype=np.float32))
    maps = MapFitter(model, examples, num_examples=4, num_components=30, rank=384, bits=32, most_blocks=2).fit(theta, 0, 1)
    found = TorchForward(model, examples, range(4), None).estimate(theta, range(4), decoded(model, maps))[0]
    gradient = true_gradient(model, examples, theta, range(4))
    mapped = [(start, stop) for start, stop in model.layout.ranges.values() if stop <= model.adapted.exact_start]
    assert (maps.num_directions, maps.num_components, sum(map(len, examples.token_ids)), len(mapped)) == (2, 25, 25, 8)
    for start, stop in mapped:
        assert cosine(found[start:stop], gradient[start:stop]) > 0.999
        assert np.linalg.norm(found[start:stop]) == pytest.approx(np.linalg.norm(gradient[start:stop]), rel=0.02)


def test_with_label_texts_maps_give_the_gradient_without_a_head(compared):
    found = compared.device.estimate(compared.theta, CHOSEN, compared.decoded)[0]
    assert (compared.model.adapted.has_head, compared.model.adapted.exact_start) == (False, len(compared.theta) // 2)
    assert cosine(found, compared.gradient) > 0.95
    assert cosine(found[compared.mapped], compared.gradient[compared.mapped]) > 0.9


def test_maps_know_how_to_reach_query_adapters():
    """What a query does to attention is found in the layer's own forward pass; a map that only fitted values would give noise."""
    queries = after_training(ModelConfig(target_modules=("query",)), 0.5)
    found = queries.device.estimate(queries.theta, CHOSEN, queries.decoded)[0][queries.mapped]
    # By chance two vectors of 6 144 numbers have a cosine near 0.013.
    assert cosine(found, queries.gradient[queries.mapped]) > 0.75


@pytest.mark.parametrize("has_maps", [False, True])
@pytest.mark.parametrize("name", ["trained", "compared", "llama"])
def test_from_the_last_layer_on_an_estimate_is_back_propagation_with_and_without_maps(request, name, has_maps):
    """With a head, with label texts, and with label words."""
    one = request.getfixturevalue(name)
    found, loss = one.device.estimate(one.theta, CHOSEN, one.decoded if has_maps else None)
    evaluate, _ = one.device.evaluate(CHOSEN)
    length = np.linalg.norm(one.gradient[one.exact])
    # The same operations on the same numbers; where a kernel sums in another order some tens of roundings of 6e-8.
    assert np.linalg.norm(found[one.exact] - one.gradient[one.exact]) < 1e-5 * length
    assert loss == pytest.approx(float(evaluate(one.theta[None])[0]), abs=2e-6)
    assert length > 0.3
    # Maps predict; without them the gradient is carried down from layer to layer, and all of it is exact.
    missed = np.linalg.norm(found[one.mapped] - one.gradient[one.mapped]) / np.linalg.norm(one.gradient[one.mapped])
    assert missed > 1e-2 if has_maps else missed < 1e-5


def test_an_estimate_is_the_mean_of_its_examples_estimates(trained):
    """Padding and neighbours change nothing."""
    together = trained.device.estimate(trained.theta, CHOSEN[:4], trained.decoded)[0]
    alone = np.mean([trained.device.estimate(trained.theta, [index], trained.decoded)[0] for index in CHOSEN[:4]], axis=0)
    # Scores move by 2e-5 with padding.
    for part in (trained.mapped, trained.exact):
        assert np.linalg.norm(together[part] - alone[part]) < 1e-4 * np.linalg.norm(alone[part])


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.network.modules()]


def test_estimating_leaves_theta_and_the_network_alone(trained):
    before = trained.theta.tobytes()
    hooks = hooks_of(trained.model)
    first = trained.device.estimate(trained.theta, CHOSEN, trained.decoded)[0]
    trained.fitter.fit(trained.theta, 5, 6)
    assert trained.device.estimate(trained.theta, CHOSEN, trained.decoded)[0].tobytes() == first.tobytes()
    assert trained.theta.tobytes() == before
    assert hooks_of(trained.model) == hooks


def test_labels_play_no_part_in_the_maps(trained):
    lied = Examples(token_ids=trained.public.token_ids, labels=1 - trained.public.labels, states=trained.public.states)
    fitter = MapFitter(trained.model, lied, num_examples=96, num_components=24, rank=24, bits=8, most_blocks=2)
    assert encode(fitter.fit(trained.theta, 5, 6)) == encode(trained.maps)


# What slopes say of an estimate.


def rectified(trained, report):
    estimate = unpack_vector(report.estimate, len(trained.theta))
    return feedback.rectified(estimate, trained.fitter.blocks, feedback.gains(report.agreement, report.energy))


def test_slopes_confirm_good_maps(trained):
    report = answered(trained, trained.decoded)
    found, estimate = rectified(trained, report), unpack_vector(report.estimate, len(trained.theta))
    assert report.outcome is Outcome.OK
    for (start, stop), agreement in zip(trained.fitter.blocks, report.agreement, strict=True):
        part, gradient = estimate[start:stop], trained.gradient[start:stop]
        # A slope at half-step 0.03 carries 6e-8 / 0.06 of rounding and a cubic term.
        assert agreement == pytest.approx(float(part @ gradient), rel=0.05)
        assert np.linalg.norm(found[start:stop] - gradient) < 0.6 * np.linalg.norm(gradient)


def with_random_factors(trained, seed):
    size = 2 * 24 * (trained.maps.num_directions * (1 + 2 * 24) + trained.model.adapted.width)
    return decoded(trained.model, replace(trained.maps, factors=pack_vector(noise.gaussian(seed, 0, size), 32)))


def test_what_random_maps_leave_of_a_block_is_a_chance_alignment(trained):
    shares = []
    for seed in range(1, 9):
        found = rectified(trained, answered(trained, with_random_factors(trained, seed)))
        norms = [(np.linalg.norm(found[start:stop]), np.linalg.norm(trained.gradient[start:stop])) for start, stop in trained.fitter.blocks]
        shares += [(part / whole) ** 2 for part, whole in norms]
    # A projection of the gradient, so never longer than it; of the energy two per cent were seen, of good maps' it is most.
    assert max(shares) <= 1.1
    assert np.mean(shares) < 0.05


def test_random_maps_leave_the_exact_part_untouched_and_have_a_gain_near_zero(trained):
    good, random = (answered(trained, maps) for maps in (trained.decoded, with_random_factors(trained, 1)))
    first, second = (unpack_vector(report.estimate, len(trained.theta))[trained.exact] for report in (good, random))
    assert first.tobytes() == second.tobytes()
    assert feedback.gains(good.agreement, good.energy).min() > 0.7
    assert np.abs(feedback.gains(random.agreement, random.energy)).max() < 0.05


@pytest.mark.parametrize("found", [None, "older"])
def test_a_plan_that_names_other_maps_than_the_device_holds_is_refused(trained, found):
    held = None if found is None else replace(trained.decoded, version=5)
    with pytest.raises(ProtocolError, match=r"maps of version 6 expected, (none|version 5) found"):
        answered(trained, held)


@pytest.mark.parametrize("excess", [1, 1 << 32])
def test_a_block_outside_theta_is_refused(trained, excess):
    with pytest.raises(ProtocolError, match="blocks"):
        answered(trained, trained.decoded, blocks=[(0, len(trained.theta) + excess)])


def test_a_device_with_a_zero_estimate_measures_nothing_and_stays_finite(trained):
    """A head that starts at zero lets no gradient through; it has one of its own."""
    theta = trained.model.initial_parameters(3)
    report = answered(trained, None, maps_version=-1, theta=theta)
    assert (report.outcome, report.agreement.tolist(), report.energy.tolist()) == (Outcome.OK, [0, 0], [0, 0])
    assert unpack_vector(report.estimate, len(theta)).any()


# Layers and blocks.


@pytest.mark.parametrize("last_layers", [1, 2, 4, None])
def test_blocks_cover_what_needs_maps_exactly_and_cut_no_layer(last_layers):
    """MiniLM has six layers, of which the last is exact."""
    adapted = models.load(ModelConfig(last_layers=last_layers), 2).adapted
    count = (last_layers or 6) - 1
    assert len(adapted.below) == count
    for most in (1, 2, 4, 99):
        blocks = adapted.blocks(most)
        assert len(blocks) == min(most, count)
        assert [position for start, stop in blocks for position in range(start, stop)] == list(range(adapted.exact_start))
        assert {start for start, _ in blocks} <= {layer.start for layer in adapted.below}
        sizes = [sum(start <= layer.start < stop for layer in adapted.below) for start, stop in blocks]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize(
    ("adapter", "targets", "is_complete"),
    [(AdapterKind.LORA, ("q_proj", "v_proj"), True), (AdapterKind.IA3, ("k_proj", "v_proj"), True), (AdapterKind.FULL, (), False)],
)
def test_adapters_and_a_head_are_seen_completely_and_a_whole_model_is_not(adapter, targets, is_complete):
    model = models.load(ModelConfig(name="tiny-llama", adapter=adapter, target_modules=targets), 2)
    assert model.adapted.is_complete is is_complete


# Whole runs.


MAPPED = {"map_examples": 64, "map_components": 8, "map_rank": 8, "basis_size": 8, "feedback_blocks": 1, "queries": 4, "local_steps": 2}
"""Two estimates of three passes each and a block of two are four queries to the last pass."""


def tiny(**changes):
    config = replace(cooperllm.recipe("tiny").with_arm(ArmName.FEEDBACK), engine=EngineName.LOOPBACK, num_rounds=5)
    return replace(config, arm=replace(config.arm, **MAPPED), **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return cooperllm.run(tiny(), tmp_path_factory.mktemp("feedback") / "whole")


def test_the_feedback_arm_learns(whole):
    rounds = RunDirectory(whole.path).rounds()
    assert rounds[-1]["loss"] < rounds[0]["loss_before"]
    assert min(row["gain"] for row in rounds) > 0.25  # worthless maps have 0


def test_queries_are_what_forward_passes_paid_for(whole):
    for row in RunDirectory(whole.path).rounds():
        assert row["forward_passes"] == 2 * row["queries"] * row["num_reports"]


@pytest.mark.parametrize(("stop", "keeps_checkpoint"), [(1, True), (2, True), (2, False), (3, True), (4, False)])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, whole, stop, keeps_checkpoint):
    """Maps are fitted at versions 0, 1, 2 and 4 and checkpoints written at 2 and 4: cut before, at and after both."""
    with pytest.raises(Interrupt):
        cooperllm.run(tiny(), tmp_path / "cut", interrupt_after(stop))
    if not keeps_checkpoint:
        (tmp_path / "cut" / "checkpoint.bin").unlink(missing_ok=True)
    cut = cooperllm.resume(tmp_path / "cut")
    assert (cut.path / "replay.log").read_bytes() == (whole.path / "replay.log").read_bytes()


def test_the_in_process_grid_gives_the_numbers_of_the_reference(tmp_path, whole):
    grid = cooperllm.run(tiny(engine=EngineName.GRID), tmp_path / "grid")
    assert (grid.path / "replay.log").read_bytes() == (whole.path / "replay.log").read_bytes()
    for key in ("bytes_down", "bytes_up", "forward_passes", "dropped_reports"):
        assert grid.summary["arms"]["feedback"][key] == whole.summary["arms"]["feedback"][key]


def test_adam_replays_a_feedback_run(tmp_path):
    run = cooperllm.run(tiny(num_rounds=2, optimizer=OptimizerConfig(kind=OptimizerKind.ADAM)), tmp_path / "run")
    files = RunDirectory(run.path)
    replica = assemble(files).start
    for update in files.updates():
        replica = replay.apply(replica, update, files.config().optimizer)
    assert replica.model_version == 2


class Watched(Loopback):
    """The reference link, with an eye on what orders ask for and which of them carry maps."""

    def __init__(self, devices):
        super().__init__(devices)
        self.maps, self.asked = [], []

    def exchange(self, orders):
        self.maps.append({order.device_id: [maps.version for maps in order.plan.maps] for order in orders if order.plan.maps})
        self.asked += [order.plan.feedback for order in orders]
        return super().exchange(orders)


def test_maps_travel_only_to_devices_that_do_not_have_them(tmp_path):
    """Two devices that always take part, fits at versions 0, 1, 2 and 4."""
    config = tiny(federation=replace(tiny().federation, num_devices=2, num_edges=1, devices_per_round=2))
    assembly = assemble(RunDirectory.create(tmp_path / "run", config))
    cloud, link = assembly.cloud(), Watched(assembly.devices())
    tiers = LocalEdges(assembly.edges(), link)
    results = [run_round(cloud, tiers) for _ in range(5)]
    assert link.maps == [{0: [0], 1: [0]}, {0: [1], 1: [1]}, {0: [2], 1: [2]}, {}, {0: [4], 1: [4]}]
    saved = 2 * len(cloud.maps()[0].factors)
    assert results[2].bytes_down - results[3].bytes_down > saved
    assert results[2].bytes_between - results[3].bytes_between > saved / 2


def often(**changes):
    """Whole maps at versions 0 and 1, differences at 2, 3, 4, 5 and so on: map_refresh 1."""
    config = tiny(**changes)
    return replace(config, arm=replace(config.arm, map_refresh=1))


def test_a_refresh_sends_what_has_changed_and_a_newcomer_everything(tmp_path):
    """One of three devices takes part in a round: the whole maps and the differences that it has not had."""
    federation = replace(tiny().federation, num_devices=3, num_edges=1, devices_per_round=1)
    assembly = assemble(RunDirectory.create(tmp_path / "run", often(federation=federation, num_rounds=9)))
    cloud, link = assembly.cloud(), Watched(assembly.devices())
    tiers = LocalEdges(assembly.edges(), link)
    expected, held = [], {}
    for version in range(9):
        run_round(cloud, tiers)
        chain = [version] if version < 2 or version == 8 else list(range(1, version + 1))
        ((device_id, sent),) = link.maps[-1].items()
        known = held.get(device_id, -1)
        expected.append(chain[chain.index(known) + 1 :] if known in chain else chain)
        held[device_id] = version
        assert sent == expected[-1]
        assert [maps.version for maps in cloud.maps()] == chain
    assert len({len(sent) for sent in expected}) > 2


@pytest.mark.parametrize(("stop", "keeps_checkpoint"), [(3, True), (4, True), (4, False)])
def test_a_run_interrupted_between_differences_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, stop, keeps_checkpoint):
    cooperllm.run(often(), tmp_path / "whole")
    with pytest.raises(Interrupt):
        cooperllm.run(often(), tmp_path / "cut", interrupt_after(stop))
    if not keeps_checkpoint:
        (tmp_path / "cut" / "checkpoint.bin").unlink(missing_ok=True)
    cooperllm.resume(tmp_path / "cut")
    assert (tmp_path / "cut" / "replay.log").read_bytes() == (tmp_path / "whole" / "replay.log").read_bytes()


def test_a_difference_mends_maps_that_have_aged(trained):
    """At another θ: to what is held, mistakes of the codec included, and with directions and basis of the whole maps."""
    model = trained.model
    theta, _ = trained.device.train(trained.theta, [[16 + (8 * i + j) % 32 for j in range(8)] for i in range(4)], 1.0)
    gradient, mapped = true_gradient(model, trained.private, theta), trained.mapped
    difference = trained.fitter.fit(theta, 5, 8, [trained.maps])
    aged, mended, anew = (
        cosine(trained.device.estimate(theta, CHOSEN, decoded(model, *maps))[0][mapped], gradient[mapped])
        for maps in ([trained.maps], [trained.maps, difference], [trained.fitter.fit(theta, 5, 8)])
    )
    # Two thirds of what was lost come back for half the bytes; the rest lies outside of the basis.
    assert mended - aged > (anew - aged) * 2 / 3 > 0.1
    assert (difference.base_version, difference.num_directions, difference.directions, difference.basis) == (6, 0, None, None)
    assert len(encode(difference)) < 0.6 * len(encode(trained.maps))


def test_a_model_that_feedback_cannot_train_is_refused_before_anything_is_written(tmp_path):
    config = tiny(model=replace(tiny().model, adapter=AdapterKind.FULL, target_modules=()))
    with pytest.raises(ConfigError, match="feedback"):
        cooperllm.run(config, tmp_path / "run")
    measured = replace(cooperllm.recipe("tiny").with_arm(ArmName.MEASURED), model=config.model)
    with pytest.raises(ConfigError, match="feedback"):
        cooperllm.compare([measured, config], tmp_path / "both")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [{"name": "none"}, {"label_column": None}], ids=["no text", "no labels"])
def test_a_cloud_without_labels_still_serves_every_arm_but_those_that_need_them(tmp_path, source):
    base = tiny(num_rounds=2)
    base = replace(base, data=replace(base.data, public=replace(base.data.public, **source)))
    for name in (ArmName.MEASURED, ArmName.MEZO_FL, ArmName.FEEDBACK):
        run = cooperllm.run(replace(base, arm=replace(base.arm, name=name)), tmp_path / name.value)
        assert run.summary["arms"][name.value]["finished"]
    for name in (ArmName.CLOUD_ONLY, ArmName.PAPER):
        with pytest.raises(ConfigError, match=f"{name.value} back-propagates on labelled public text"):
            cooperllm.run(replace(base, arm=replace(base.arm, name=name)), tmp_path / name.value)


def without_text(config):
    return replace(config, data=replace(config.data, public=replace(config.data.public, name="none")))


def with_the_last_layer_alone(config):
    return replace(config, model=replace(config.model, last_layers=1))


@pytest.mark.parametrize(("change", "num_blocks"), [(without_text, 1), (with_the_last_layer_alone, 0)])
def test_without_maps_and_without_a_head_feedback_learns_and_sends_none(tmp_path, change, num_blocks):
    """The gradient is carried down from the last layer, and slopes along a block of it find all of it true."""
    federation = replace(tiny().federation, num_devices=2, num_edges=1, devices_per_round=2, batch_size=200)  # every text every round
    assembly = assemble(RunDirectory.create(tmp_path / "run", change(tiny(federation=federation))))
    cloud, link = assembly.cloud(), Watched(assembly.devices())
    tiers = LocalEdges(assembly.edges(), link)
    losses = [run_round(cloud, tiers).closed.update.loss for _ in range(5)]
    assert link.maps == [{}] * 5
    assert {(feedback.maps_version, len(feedback.blocks)) for feedback in link.asked} == {(-1, num_blocks)}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("queries", "is_same"), [(4, True), (6, False)])
def test_with_every_query_in_estimates_and_blocks_public_labels_change_no_bit(tmp_path, queries, is_same):
    """Of queries that are left over the first measures the momentum and the second the public gradient, which labels do decide."""
    base = tiny(num_rounds=3)
    base = replace(base, arm=replace(base.arm, queries=queries))
    noisy = replace(base, data=replace(base.data, public=replace(base.data.public, label_noise=1.0)))
    hashes = [
        [row["theta_hash"] for row in RunDirectory(cooperllm.run(config, tmp_path / name).path).rounds()]
        for name, config in (("clean", base), ("noisy", noisy))
    ]
    assert (hashes[0] == hashes[1]) is is_same


def wild(learning_rate, **changes):
    config = tiny(**changes)
    return replace(config, arm=replace(config.arm, learning_rate=learning_rate))


def test_a_diverged_feedback_run_says_so(tmp_path):
    with pytest.raises((DivergenceError, QuorumError), match=r"diverged|non-finite loss"):
        cooperllm.run(wild(1e30, optimizer=OptimizerConfig(rolls_back=False)), tmp_path / "run")


def test_a_diverged_run_goes_back_bit_for_bit_and_on_with_half_the_step(tmp_path):
    run = cooperllm.run(wild(1e30), tmp_path / "run")
    files = RunDirectory(run.path)
    steps = [row["step"] for row in files.rounds()]
    assert steps == ["step", "rollback", "step", "rollback", "step"]
    assert run.summary["arms"]["feedback"]["rounds_taken_back"] == [2, 4]
    assert "in round 2, 4." in (run.path / "report.html").read_text(encoding="utf8")
    start, optimizer = assemble(files).start, files.config().optimizer
    first, back, second = files.updates()[:3]
    assert replay.apply(replay.apply(start, first, optimizer), back, optimizer).theta.tobytes() == start.theta.tobytes()
    assert second.learning_rate == back.learning_rate == first.learning_rate / 2


def test_after_a_way_back_maps_are_fitted_anew(tmp_path):
    """Every other round is taken back: where scores are not finite nothing is fitted, and at version 6 no fit would be due by itself."""
    config = wild(1e30, federation=replace(tiny().federation, num_devices=2, num_edges=1, devices_per_round=2))
    assembly = assemble(RunDirectory.create(tmp_path / "run", config))
    cloud, link = assembly.cloud(), Watched(assembly.devices())
    tiers = LocalEdges(assembly.edges(), link)
    for _ in range(7):
        run_round(cloud, tiers)
    assert link.maps == [{0: [0], 1: [0]}, {}, {0: [2], 1: [2]}, {}, {0: [4], 1: [4]}, {}, {0: [6], 1: [6]}]


@pytest.mark.parametrize("keeps_checkpoint", [True, False])
def test_a_run_interrupted_after_a_way_back_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, keeps_checkpoint):
    """The checkpoint at version 2 is written right after the first way back."""
    cooperllm.run(wild(1e30), tmp_path / "whole")
    with pytest.raises(Interrupt):
        cooperllm.run(wild(1e30), tmp_path / "cut", interrupt_after(3))
    if not keeps_checkpoint:
        (tmp_path / "cut" / "checkpoint.bin").unlink()
    cooperllm.resume(tmp_path / "cut")
    assert (tmp_path / "cut" / "replay.log").read_bytes() == (tmp_path / "whole" / "replay.log").read_bytes()
