"""The default model, adapters, prefix cache, label words, label texts and export: the real weights, and plain PEFT as the judge."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cooperllm
from cooperllm import models, pretrained
from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.rounding import NO_ROUNDING, least_half_step
from cooperllm.assembly import Assembly, Material, assemble
from cooperllm.classifiers import classifier_for
from cooperllm.cloud import BackPropagation, GuideMaker
from cooperllm.config import AdapterKind, ArmName, EngineName, ModelConfig, Objective, Variant, WeightType
from cooperllm.errors import ConfigError
from cooperllm.packaging import write_package
from cooperllm.run_directory import RunDirectory

TEXTS = [
    "A stirring, funny film.",
    "It fell apart on the second day and nobody cared.",
    "Fine.",
    "The room was cold, but the bed was lovely.",
]
TINY = ModelConfig(name="tiny-llama", target_modules=("q_proj", "v_proj"), last_layers=1, max_tokens=64)
WORDS = replace(TINY, objective=Objective.LABEL_WORDS, label_words=("bad", "good"))
COMPARED = ModelConfig(objective=Objective.LABEL_TEXTS, label_words=("a bad film", "a great film and a good long evening"))
TINY_COMPARED = replace(COMPARED, name="tiny-llama", target_modules=("q_proj", "v_proj"), last_layers=1, max_tokens=64)


def moved(model, seed=3):
    """Parameters away from their start, so that no part is zero."""
    theta = torch.from_numpy(model.initial_parameters(seed))
    return theta + 0.02 * torch.sin(torch.arange(len(theta)))


def scores(model, theta):
    examples = model.encode(TEXTS, None, [0, 1, 0, 1])
    with torch.inference_mode():
        return model.scores(theta, model.batch(examples, range(len(TEXTS))))


def plain_backbone(config):
    """The pretrained network without any of our code around it, and its tokenizer."""
    if config.name == "tiny-llama":
        return pretrained.tiny_llama(causal=False)
    place = pretrained.packaged_minilm()
    return AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)


def mean_states(network, token_ids, mask):
    hidden, weights = network(input_ids=token_ids, attention_mask=mask).last_hidden_state, mask[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def cosines(rows, others):
    return torch.nn.functional.cosine_similarity(rows[:, None], others[None], dim=2)


@pytest.mark.parametrize("config", [ModelConfig(), WORDS, COMPARED], ids=["minilm", "label words", "label texts"])
def test_no_texts_are_no_examples(config):
    examples = models.load(config, 2).encode([], None, [])
    assert (len(examples), examples.labels.shape) == (0, (0,))


def test_the_default_model_trains_lora_on_query_and_value_of_its_last_two_layers_and_a_head():
    layout = models.load(ModelConfig(), 2).layout
    # two layers x (query, value) x (8 x 384 + 384 x 8) + head 2 x 384 + 2
    assert layout.size == 2 * 2 * 2 * 8 * 384 + 2 * 384 + 2
    assert {name.split(".")[5] for name in layout.names if "lora" in name} == {"4", "5"}


# Pooled states differ by less than 1e-6; label texts take their cosines times 20.
@pytest.mark.parametrize(("config", "most"), [(ModelConfig(), 1e-6), (COMPARED, 2e-5)], ids=["head", "label texts"])
def test_the_cached_prefix_changes_no_score(config, most):
    cached, plain = (models.load(replace(config, caches_prefix=caches), 2) for caches in (True, False))
    torch.testing.assert_close(scores(cached, moved(cached)), scores(plain, moved(plain)), rtol=0, atol=most)


def test_the_prefix_is_computed_once_per_example(monkeypatch):
    model = models.load(ModelConfig(), 2)
    examples = model.encode(TEXTS, None, [0, 1, 0, 1])
    model.batch(examples, [0, 1, 1])
    monkeypatch.setattr(model.prefix, "compute", lambda *arguments: pytest.fail("an example went through the frozen layers twice"))
    model.batch(examples, [1, 0])


@pytest.mark.parametrize("name", ["minilm", "tiny-llama"])
def test_the_prefix_of_an_example_has_the_same_bits_alone_and_in_company(name):
    """A resumed run meets its examples in other batches than an uninterrupted one; the number of tokens of a pass chooses the kernel."""
    model = models.load(ModelConfig(name=name, target_modules=() if name == "tiny-llama" else ("query", "value"), last_layers=1), 2)
    texts = ["x" * length for length in range(1, 33)] + [" ".join(["word"] * count) for count in range(1, 31)]
    together, alone = (model.encode(texts, None, [0] * len(texts)) for _ in range(2))
    model.batch(together, range(len(texts)))
    for index in range(len(texts)):
        model.batch(alone, [index])
    assert [index for index in range(len(texts)) if not torch.equal(together.states[index], alone.states[index])] == []


def test_padding_changes_no_score():
    model = models.load(ModelConfig(), 2)
    theta, examples = moved(model), model.encode(TEXTS, None, [0, 1, 0, 1])
    with torch.inference_mode():
        alone = torch.cat([model.scores(theta, model.batch(examples, [index])) for index in range(4)])
        together = model.scores(theta, model.batch(examples, range(4)))
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(adapter=AdapterKind.IA3), replace(TINY, adapter=AdapterKind.IA3)])
def test_plain_peft_loads_an_exported_adapter_and_gives_the_same_scores(tmp_path, config):
    model = models.load(config, 2)
    theta = moved(model)
    model.save_adapter(theta.numpy(), tmp_path, ["no", "yes"])
    plain = PeftModel.from_pretrained(plain_backbone(config)[0], str(tmp_path)).eval()
    head = load_file(tmp_path / "classifier.safetensors")
    batch = model.batch(model.encode(TEXTS, None, [0, 1, 0, 1]), range(4))
    with torch.inference_mode():
        expected = mean_states(plain, batch.token_ids, batch.mask) @ head["weight"].T + head["bias"]
    torch.testing.assert_close(scores(model, theta), expected, rtol=0, atol=1e-5)


LORA_OR_IA3 = [COMPARED, replace(COMPARED, adapter=AdapterKind.IA3), TINY_COMPARED]


@pytest.mark.parametrize("config", LORA_OR_IA3)
def test_with_label_texts_the_start_gives_20_times_the_plain_backbones_cosines(config):
    """Embeddings taken at other parameters, from padded texts or from another token than the mean would show."""
    network, tokenizer = plain_backbone(config)
    with torch.inference_mode():
        states = [
            torch.cat([
                mean_states(network, ids, torch.ones_like(ids)) for ids in (tokenizer(t, return_tensors="pt").input_ids for t in part)
            ])
            for part in (TEXTS, config.label_words)
        ]
    model = models.load(config, 2)
    # Cosines of pooled float32 states agree to 1e-6, with padding, times 20.
    torch.testing.assert_close(scores(model, torch.from_numpy(model.initial_parameters(3))), 20 * cosines(*states), rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", LORA_OR_IA3)
def test_plain_peft_and_the_exported_label_embeddings_give_the_same_scores(tmp_path, config):
    model = models.load(config, 2)
    theta = moved(model)
    model.save_adapter(theta.numpy(), tmp_path, ["no", "yes"])
    plain = PeftModel.from_pretrained(plain_backbone(config)[0], str(tmp_path)).eval()
    rows = load_file(tmp_path / "label_embeddings.safetensors")["weight"]
    batch = model.batch(model.encode(TEXTS, None, [0, 1, 0, 1]), range(4))
    with torch.inference_mode():
        expected = 20 * cosines(mean_states(plain, batch.token_ids, batch.mask), rows)
    assert not (tmp_path / "classifier.safetensors").exists()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(scores(model, theta), expected, rtol=0, atol=2e-5)
    # The adapter moves the texts and leaves the classes' rows where they were.
    start = torch.from_numpy(model.initial_parameters(3))
    assert (scores(model, theta) - scores(model, start)).abs().max() > 1e-3
    torch.testing.assert_close(rows, models.load(config, 2).network.label_embeddings, rtol=0, atol=0)


def test_label_texts_of_a_fully_trained_model_stay_those_of_the_pretrained_one(tmp_path):
    model = models.load(replace(TINY_COMPARED, adapter=AdapterKind.FULL, target_modules=()), 2)
    theta = moved(model)
    model.save_adapter(theta.numpy(), tmp_path, ["no", "yes"])
    rows = load_file(tmp_path / "label_embeddings.safetensors")["weight"]
    batch = model.batch(model.encode(TEXTS, None, [0, 1, 0, 1]), range(4))
    with torch.inference_mode():
        expected = 20 * cosines(mean_states(AutoModel.from_pretrained(tmp_path).eval(), batch.token_ids, batch.mask), rows)
    assert torch.equal(rows, models.load(TINY_COMPARED, 2).network.label_embeddings)
    torch.testing.assert_close(scores(model, theta), expected, rtol=0, atol=2e-5)


def test_with_label_texts_nothing_but_the_adapter_is_trained():
    model = models.load(COMPARED, 2)
    # two layers x (query, value) x (8 x 384 + 384 x 8)
    assert model.layout.size == 2 * 2 * 2 * 8 * 384
    assert (model.adapted.has_head, model.adapted.is_complete) == (False, True)


def test_with_label_texts_points_of_one_pass_have_the_losses_that_they_have_alone():
    from cooperllm.device.torch_forward import TorchForward

    model = models.load(COMPARED, 2)
    examples = model.encode(TEXTS, None, [0, 1, 0, 1])
    points = np.stack([moved(model, seed).numpy() for seed in (1, 2, 3)])
    budget = 3 * model.activation_mib(model.batch(examples, range(4)))
    together, at_once = TorchForward(model, examples, range(4), budget).evaluate(range(4))
    alone, _ = TorchForward(model, examples, range(4), None).evaluate(range(4))
    assert at_once == 3
    # Another attention kernel: scores near 10 differ by 1e-5 at most.
    np.testing.assert_allclose(together(points), np.concatenate([alone(point[None]) for point in points]), atol=2e-5)


def test_plain_peft_loads_a_causal_adapter(tmp_path):
    model = models.load(WORDS, 2)
    theta = moved(model)
    model.save_adapter(theta.numpy(), tmp_path, ["no", "yes"])
    plain = PeftModel.from_pretrained(pretrained.tiny_llama(causal=True)[0], str(tmp_path)).eval()
    batch = model.batch(model.encode(TEXTS, None, [0, 1, 0, 1]), range(4))
    with torch.inference_mode():
        logits = plain(input_ids=batch.token_ids, attention_mask=batch.mask).logits[torch.arange(4), batch.mask.sum(1) - 1]
    expected = logits[:, model.network.word_ids]
    torch.testing.assert_close(scores(model, theta), expected, rtol=0, atol=1e-5)


def test_a_fully_trained_model_is_exported_as_an_ordinary_model(tmp_path):
    model = models.load(replace(WORDS, adapter=AdapterKind.FULL, target_modules=()), 2)
    theta = moved(model)
    model.save_adapter(theta.numpy(), tmp_path, ["no", "yes"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = model.batch(model.encode(TEXTS, None, [0, 1, 0, 1]), range(4))
    with torch.inference_mode():
        logits = plain(input_ids=batch.token_ids, attention_mask=batch.mask).logits[torch.arange(4), batch.mask.sum(1) - 1]
    torch.testing.assert_close(scores(model, theta), logits[:, model.network.word_ids], rtol=0, atol=1e-5)


def test_slopes_of_the_default_model_agree_with_back_propagation():
    from cooperllm.algorithm import noise, zeroth_order
    from cooperllm.device.torch_forward import TorchForward

    model = models.load(ModelConfig(), 2)
    theta = moved(model)
    examples = model.encode(TEXTS, None, [0, 1, 0, 1])
    point = theta.clone().requires_grad_()
    batch = model.batch(examples, range(4))
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model.scores(point, batch), batch.labels), point)
    directions = [noise.gaussian(1, index, len(theta)) for index in range(6)]
    evaluate, _ = TorchForward(model, examples, range(4), None).evaluate(range(4))
    measured = zeroth_order.slopes(evaluate, theta.numpy(), directions, 1e-3)
    exact = np.array([float(gradient @ torch.from_numpy(z)) for z in directions])
    # Rounding of two float32 losses near 1 gives 1e-7 / 2e-3 = 5e-5; the cubic term is of the same order at this step.
    np.testing.assert_allclose(measured, exact, atol=5e-3 * float(gradient.norm()))


@pytest.mark.parametrize("caches_prefix", [True, False])
@pytest.mark.parametrize("config", [ModelConfig(last_layers=3), WORDS, replace(WORDS, adapter=AdapterKind.FULL, target_modules=())])
def test_checkpointed_layers_give_the_same_gradient_and_keep_less(config, caches_prefix):
    """The second run of a layer comes when the network holds its own weights again: with those the gradient would be of another point."""
    model = models.load(replace(config, caches_prefix=caches_prefix), 2)
    batch = model.batch(model.encode(TEXTS, None, [0, 1, 0, 1]), range(4))
    kept, gradients = [], []
    for context in (nullcontext(), model.checkpointed()):
        point, sizes = moved(model).requires_grad_(), []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with context, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = torch.nn.functional.cross_entropy(model.scores(point, batch), batch.labels)
        gradients.append(torch.autograd.grad(loss, point)[0])
        kept.append(sum(sizes))
    assert gradients[0].any()
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 2


def test_a_long_text_is_cut_but_its_prompt_is_not():
    model = models.load(replace(WORDS, max_tokens=40), 2)
    (ids,) = model.encode(["x" * 500], None, [0]).token_ids
    assert len(ids) <= 40
    assert model._tokenizer.decode(ids, skip_special_tokens=True).endswith(" It was")


def sentence_pieces():
    """As Llama's: words begin with a mark that stands for the space before them, and so does every text."""
    pieces = ["<unk>", "▁", "b", "a", "d", "g", "o", "I", "t", "w", "s", ":", "▁b", "▁g", "▁w", "▁I"]
    merges = [("▁", "b"), ("▁", "g"), ("▁", "w"), ("▁", "I")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), pieces


@pytest.mark.parametrize("prompt", ["{text} It was", "{text}:", "{text} It was "])
def test_label_words_are_read_as_they_stand_behind_the_prompt(prompt):
    """Read alone, words behind a space would all begin with the piece for the space."""
    tokenizer, pieces = sentence_pieces()
    config = replace(WORDS, prompt=prompt, label_words=("bad", "good"))
    network = classifier_for(config, pretrained.tiny_llama(causal=True)[0], tokenizer, 2)(pretrained.tiny_llama(causal=True)[0])
    assert [pieces[token] for token in network.word_ids] == ["▁b", "▁g"]


@pytest.mark.parametrize("config", [ModelConfig(), COMPARED], ids=["head", "label texts"])
def test_second_texts_are_read(config):
    model = models.load(config, 2)
    pair, single = model.encode(["one"], ["two"], [0]), model.encode(["one"], None, [0])
    assert len(pair.token_ids[0]) > len(single.token_ids[0])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ModelConfig(target_modules=("nowhere",)), r"target_modules: found \['nowhere'\], expected names of linear layers .*'query'"),
        (ModelConfig(name="no/such-model"), "'no/such-model' could not be loaded"),
        (replace(WORDS, label_words=("bad", "good", "fair")), "expected 2 words, one per class"),
        (replace(WORDS, label_words=("bad", "big")), "begin with the same token"),
        (replace(COMPARED, label_words=("bad", "fair", "good")), "expected 2 words, one per class"),
        (replace(COMPARED, label_words=("a film", "a film")), r"found \('a film', 'a film'\), expected texts that differ"),
        (replace(COMPARED, label_words=("A film", "a film")), "two of these are the same to the model"),
        (replace(COMPARED, max_tokens=4, label_words=("one film that is bad", "one film that is good")), "within their first 4 tokens"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_a_sentence(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        models.load(config, 2)


def test_one_class_is_not_a_task():
    with pytest.raises(ConfigError, match="found 1 classes, expected at least 2"):
        models.load(TINY, 1)


LOW = pytest.mark.parametrize("dtype", [WeightType.BFLOAT16, WeightType.FLOAT16], ids=lambda dtype: dtype.value)


@LOW
@pytest.mark.parametrize("config", [ModelConfig(), WORDS, TINY_COMPARED], ids=["head", "label words", "label texts"])
def test_weights_of_two_bytes_leave_what_is_trained_and_scores_in_float32(config, dtype):
    exact, model = models.load(config, 2), models.load(replace(config, dtype=dtype), 2)
    kept = {name: tensor.dtype for name, tensor in model.network.named_parameters()}
    assert {kept[name] for name in model.layout.names} == {torch.float32}
    frozen = {kept[name] for name in kept if name not in model.layout.names}
    assert frozen == {getattr(torch, dtype.value)}
    found = scores(model, moved(model))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores(exact, moved(exact)), rtol=0, atol=0.1)
    assert not torch.equal(found, scores(exact, moved(exact)))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A causal model of random weights whose rows are blocks of 64."""
    place = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, tie_word_embeddings=True))
    with torch.no_grad():
        for index, (name, tensor) in enumerate(model.named_parameters()):
            if "norm" not in name:
                tensor.copy_(0.15 * torch.from_numpy(noise.gaussian(5, index, tensor.numel())).view(tensor.shape))
    model.save_pretrained(place)
    pretrained.tiny_llama(causal=True)[1].save_pretrained(place)
    return str(place)


QUANTISED = pytest.mark.parametrize("dtype", [WeightType.INT8, WeightType.NF4], ids=lambda dtype: dtype.value)


@QUANTISED
@pytest.mark.parametrize("config", [None, WORDS, TINY_COMPARED], ids=["head", "label words", "label texts"])
def test_quantised_weights_are_codes_and_leave_what_is_trained_and_scores_in_float32(config, dtype, on_disk):
    """The widest gap between codes of nf4 is .304 of a block's largest weight, that of int8 1/127 of a row's, of numbers rounded to float16
    before; half of it is the error."""
    config = ModelConfig() if config is None else replace(config, name=on_disk)
    exact, model = models.load(config, 2), models.load(replace(config, dtype=dtype), 2)
    found = scores(model, moved(model))
    assert found.dtype == torch.float32
    assert not torch.equal(found, scores(exact, moved(exact)))
    assert model.layout == exact.layout
    kept = {name: tensor.dtype for name, tensor in model.network.named_parameters()}
    assert {kept[name] for name in model.layout.names} == {torch.float32}
    of_layers = [name for name in kept if name.endswith("base_layer.weight")]
    assert {kept[name] for name in of_layers} == {torch.int8 if dtype is WeightType.INT8 else torch.uint8}
    for name in of_layers:
        owner, wanted = name.removesuffix(".weight"), exact.network.get_parameter(name)
        error = (dequantize_module_weight(model.network.get_submodule(owner)) - wanted).abs().max() / wanted.abs().max()
        assert 0 < error < (0.5 / 127 + 2**-11 if dtype is WeightType.INT8 else 0.153)


@pytest.mark.parametrize("adapter", [AdapterKind.LORA, AdapterKind.IA3], ids=lambda adapter: adapter.value)
def test_the_gradient_through_four_bits_is_the_slope_of_their_loss_whatever_went_before(adapter, on_disk):
    """All layers are adapted, so that gradients pass frozen codes, after a pass without a graph: on processors that multiply bfloat16
    bitsandbytes repacks four bits then, and lets no gradient through."""
    model = models.load(replace(WORDS, name=on_disk, adapter=adapter, last_layers=None, dtype=WeightType.NF4), 2)
    public, theta = model.encode(TEXTS, None, [0, 1, 0, 1]), moved(model)
    direction = 0.001 * torch.cos(torch.arange(len(theta), dtype=torch.float32))

    def loss(point):
        batch = model.batch(public, range(4))
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model.scores(point, batch).double(), batch.labels))

    slope = (loss(theta + direction) - loss(theta - direction)) / 2
    assert abs(slope) > 5e-4
    ((gradient, _),) = BackPropagation(model, public)(theta.numpy(), [(np.arange(4), None)])
    # Losses are rounded to 2⁻²⁴ or so, a ten-thousandth of the slope; curvature does less at this step.
    assert float(torch.from_numpy(gradient) @ direction) == pytest.approx(slope, rel=2e-3)


@QUANTISED
def test_a_gradient_through_codes_is_the_same_with_checkpoints_and_near_that_of_exact_weights_with_eight_bits(dtype, on_disk):
    exact, model = (models.load(replace(WORDS, name=on_disk, last_layers=None, dtype=one), 2) for one in (WeightType.FLOAT32, dtype))
    public, theta, chosen = model.encode(TEXTS, None, [0, 1, 0, 1]), moved(model).numpy(), [(np.arange(4), None)]
    ((wanted, _),), ((found, loss),) = BackPropagation(exact, public)(theta, chosen), BackPropagation(model, public)(theta, chosen)
    ((again, same),) = BackPropagation(model, public, checkpoints_activations=True)(theta, chosen)
    assert (again.tobytes(), same) == (found.tobytes(), loss)
    # Weights and activations are off by 1/254 of the largest of a row, which is some hundredths of a typical one, in seven layers.
    if dtype is WeightType.INT8:
        assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


def test_a_run_on_quantised_weights_is_replayed_bit_for_bit_and_exports_an_adapter_for_plain_ones(tmp_path, on_disk):
    config = cooperllm.recipe("tiny").with_arm(ArmName.MEASURED)
    config = replace(config, model=replace(config.model, name=on_disk, dtype=WeightType.INT8), num_rounds=2, engine=EngineName.LOOPBACK)
    run = cooperllm.run(config, tmp_path / "run")
    assembly = assemble(RunDirectory(run.path))
    assert least_half_step(assembly._rounding(), config.arm.signal_to_noise) > 1e-3, "activations are rounded, too"
    replica = assembly.start
    for update in RunDirectory(run.path).updates():
        replica = replay.apply(replica, update, config.optimizer)
    assert replica.model_version == 2
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(on_disk), str(run.export(tmp_path / "adapter")))
    loaded = {name for name, tensor in plain.named_parameters() if "lora_B" in name and tensor.abs().max() > 0}
    assert loaded


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (replace(WORDS, dtype=WeightType.INT8), "model.dtype: found int8, expected float32, bfloat16 or float16 for tiny-llama"),
        (replace(WORDS, name="narrow", dtype=WeightType.NF4), r"layer model.layers.0.self_attn.q_proj has rows of 32 weights"),
    ],
    ids=["never on disk", "narrow rows"],
)
def test_a_model_that_cannot_be_quantised_is_refused(config, sentence):
    for part in pretrained.tiny_llama(causal=True):
        part.save_pretrained("narrow")
    with pytest.raises(ConfigError, match=sentence):
        models.load(config, 2)


def test_quantised_weights_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"model.dtype: 'nf4' needs the package bitsandbytes; pip install 'cooperllm\[bitsandbytes\]'"):
        models.load(replace(WORDS, dtype=WeightType.NF4), 2)


def test_a_run_on_weights_of_two_bytes_knows_their_rounding_and_is_replayed_bit_for_bit(tmp_path):
    """bfloat16 asks for half-steps of about .001 here, which is the usual one along normal numbers."""
    config = cooperllm.recipe("demo").with_arm(ArmName.MEASURED)
    config = replace(config, model=replace(config.model, dtype=WeightType.BFLOAT16), num_rounds=2, engine=EngineName.LOOPBACK)
    config = replace(config, data=replace(config.data, num_test=40, num_validation=4))
    run = cooperllm.run(config, tmp_path / "run")
    assembly = assemble(RunDirectory(run.path))
    assert assembly._rounding() is assembly._rounding(), "measured once"
    assert 1e-4 < least_half_step(assembly._rounding(), config.arm.signal_to_noise) < 1e-2
    replica = assembly.start
    for update in RunDirectory(run.path).updates():
        replica = replay.apply(replica, update, config.optimizer)
    assert replica.model_version == 2


def test_where_weights_are_float32_nobody_measures_their_rounding(tmp_path):
    config = cooperllm.recipe("demo").with_arm(ArmName.MEASURED)
    assembly = Assembly(config, RunDirectory(tmp_path), Material(config))
    assert assembly._rounding() is NO_ROUNDING


def test_a_package_of_weights_that_were_rounded_before_is_refused(tmp_path):
    model = models.load(replace(WORDS, dtype=WeightType.BFLOAT16), 2)
    with pytest.raises(ConfigError, match=r"model.dtype: found bfloat16, expected float32 for a package"):
        write_package(model, model.initial_parameters(0), tmp_path / "package", label_names=("a", "b"), variant=Variant.FP32, seed=0)
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("caches_prefix", [True, False], ids=["cached prefix", "no prefix"])
def test_a_cloud_that_checkpoints_activations_has_the_same_gradient(caches_prefix):
    model = models.load(replace(WORDS, last_layers=None if not caches_prefix else 1), 2)
    public, theta = model.encode(TEXTS, None, [0, 1, 0, 1]), moved(model).numpy()
    plain, frugal = (
        GuideMaker(model, public, 4, 1, BackPropagation(model, public, checkpoints_activations=answer)) for answer in (False, True)
    )
    gradient, loss = plain.gradient(theta, 7)
    assert np.abs(gradient).max() > 1e-3
    again, same = frugal.gradient(theta, 7)
    assert (again.tobytes(), same) == (gradient.tobytes(), loss)


def test_calibrated_label_words_say_nothing_of_no_text_and_keep_every_difference_between_texts():
    plain, calibrated = models.load(WORDS, 2), models.load(replace(WORDS, calibrates=True), 2)
    start = torch.from_numpy(calibrated.initial_parameters(3))
    examples = calibrated.encode(["N/A", "[MASK]", ""], None, [0, 0, 0])
    of_nothing = calibrated.scores(start, calibrated.batch(examples, range(3))).mean(0)
    torch.testing.assert_close(of_nothing, torch.zeros(2), rtol=0, atol=1e-5)
    shift = scores(plain, moved(plain)) - scores(calibrated, moved(calibrated))
    assert shift.abs().max() > 1e-2, "there is something to take off"
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-5)


def test_calibration_is_for_label_words():
    with pytest.raises(ConfigError, match=r"model.calibrates: found True, expected false for the objective head"):
        ModelConfig(calibrates=True)
