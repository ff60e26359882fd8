"""Any architecture: tiny models of random weights, each trained for a round, replayed, exported, and loaded by plain PEFT.

Run: pytest tests/system/test_architectures.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import cooperllm
from cooperllm import models, pretrained, token_scores
from cooperllm.algorithm import noise, replay
from cooperllm.algorithm.noise import Noise
from cooperllm.assembly import Material, assemble
from cooperllm.config import (
    AdapterKind,
    ArmName,
    Distribution,
    EngineName,
    ModelConfig,
    Objective,
    OptimizerConfig,
    OptimizerKind,
    WeightType,
)
from cooperllm.device.torch_forward import TorchForward
from cooperllm.errors import ConfigError
from cooperllm.run_directory import RunDirectory
from cooperllm.token_scores import TokenScores

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128}
CAUSAL = {
    "llama, grouped queries": (transformers.LlamaConfig, GROUPED),
    "mistral, sliding window": (transformers.MistralConfig, GROUPED | {"sliding_window": 8, "head_dim": 8}),
    "qwen2, tied": (transformers.Qwen2Config, GROUPED | {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, GROUPED | {"head_dim": 8}),
    "gemma": (transformers.GemmaConfig, GROUPED | {"head_dim": 8}),
    "gemma2, sliding and full layers": (transformers.Gemma2Config, GROUPED | {"head_dim": 8, "sliding_window": 8}),
    "phi": (transformers.PhiConfig, SIZES | {"max_position_embeddings": 128}),
    "phi3": (transformers.Phi3Config, GROUPED | {"pad_token_id": 0}),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt-neox": (transformers.GPTNeoXConfig, SIZES | {"max_position_embeddings": 128}),
    "opt": (transformers.OPTConfig, {
        "vocab_size": 260, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 128,
    }),
    "bloom": (transformers.BloomConfig, {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "olmo2": (transformers.Olmo2Config, GROUPED),
}  # fmt: skip
COUNTED_ON = ("opt", "bloom")
"""Read positions off a mask and not off what they are given."""
ENCODERS = {
    "bert": (transformers.BertConfig, SIZES),
    "roberta": (transformers.RobertaConfig, SIZES | {"max_position_embeddings": 130}),
    "distilbert": (transformers.DistilBertConfig, {"vocab_size": 260, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "electra": (transformers.ElectraConfig, SIZES | {"embedding_size": 32}),
    "deberta-v2": (transformers.DebertaV2Config, SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": (transformers.ModernBertConfig, SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 8}),
}


@pytest.fixture
def saved(request, tmp_path):
    """A directory with a model of random weights and a tokeniser of bytes, as somebody else's library would write it."""
    name = request.param
    kind, sizes = (CAUSAL | ENCODERS)[name]
    factory = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
    model = factory.from_config(kind(**sizes))
    with torch.no_grad():
        for index, tensor in enumerate(model.parameters()):
            if tensor.dim() > 1:
                tensor.copy_(torch.from_numpy(noise.gaussian(0, index, tensor.numel())).view(tensor.shape) * 0.1)
    model.save_pretrained(tmp_path / "model")
    pretrained.tiny_llama(causal=False)[1].save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def config_for(directory, *, causal, arm=ArmName.FEEDBACK):
    config = cooperllm.recipe("tiny").with_arm(arm)
    model = ModelConfig(name=directory, target_modules=(), last_layers=None, max_tokens=48)
    source = replace(config.data.private, max_examples=48)
    if causal:
        source = replace(source, completion_column="domain")
        model = replace(model, objective=Objective.NEXT_TOKEN, prompt="{text} is of")
    data = replace(config.data, public=source, private=source, num_test=4, num_validation=4)
    return replace(config, engine=EngineName.LOOPBACK, model=model, num_rounds=1, data=data)


def replayed(path):
    files = RunDirectory(path)
    replica = assemble(files).start
    for update in files.updates():
        replica = replay.apply(replica, update, files.config().optimizer)
    return replica.theta


@pytest.mark.parametrize(("saved", "arm"), [*((name, ArmName.FEEDBACK) for name in CAUSAL), ("gpt2", ArmName.MEASURED)], indirect=["saved"])
def test_a_causal_model_trains_replays_and_is_loaded_by_plain_peft_with_the_same_logits(saved, arm, tmp_path):
    """PEFT's own choice of layers, or all of them where it has none; a round of gradients, and a guided one."""
    config = config_for(saved, causal=True, arm=arm)
    run = cooperllm.run(config, tmp_path / "run")
    theta = torch.from_numpy(replayed(run.path).copy())
    model = Material(config).model
    assert not torch.equal(theta, torch.from_numpy(model.initial_parameters(noise.derive(config.seed, 2 << 32))))
    run.export(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(saved)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    examples = model.encode(["one text", "another text, a longer one"], None, [], ["films", "books and more"])
    batch = model.batch(examples, range(2))
    with torch.inference_mode():
        logits = plain(input_ids=batch.token_ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.places]
        torch.testing.assert_close(model.scores(theta, batch), logits.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("saved", ENCODERS, indirect=True)
def test_an_encoder_trains_replays_and_is_loaded_by_plain_peft_with_the_same_states(saved, tmp_path):
    config = config_for(saved, causal=False)
    config = replace(config, model=replace(config.model, objective=Objective.HEAD))
    run = cooperllm.run(config, tmp_path / "run")
    theta = torch.from_numpy(replayed(run.path).copy())
    model = Material(config).model
    run.export(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(saved), str(tmp_path / "adapter")).eval()
    batch = model.batch(model.encode(["one text", "another text, a longer one"], None, [0, 1]), range(2))
    with torch.inference_mode():
        states = plain(input_ids=batch.token_ids, attention_mask=batch.mask).last_hidden_state
        means = (states * batch.mask[..., None]).sum(1) / batch.mask.sum(1)[:, None]
        views = model.layout.views(theta)
        expected = means @ views["classifier.weight"].T + views["classifier.bias"]
        torch.testing.assert_close(model.scores(theta, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("saved", [name for name in CAUSAL if name not in COUNTED_ON], indirect=True)
def test_texts_that_share_rows_have_the_losses_and_gradients_of_texts_alone(saved):
    """Several points and directions in a pass, layers differentiated one at a time, and the whole of back-propagation."""
    said, found = ["films", "books and more", "no", "a"], list[list[np.ndarray]]()
    for packing in (False, True):
        model = models.load(replace(config_for(saved, causal=True).model, packing=packing), 0)
        theta = model.initial_parameters(3) + 0.02 * noise.gaussian(4, 0, model.layout.size)
        examples = model.encode(["one text", "another text, a longer one", "a", "b"], None, [], said)
        device, chosen = TorchForward(model, examples, range(4), 1e3), range(4)
        batch = model.batch(examples, chosen)
        assert len(batch.token_ids) == (2 if packing else 4)
        points, directions = np.stack([theta, 1.5 * theta]), noise.gaussian(5, 0, len(theta))[None]
        slopes, estimate = device.differentiate(chosen)[0](theta, directions), device.estimate(theta, chosen, None)
        trained = theta - device.train(theta, [chosen], 1.0)[0]
        found.append([device.evaluate(chosen)[0](points), *slopes, *estimate, *model.judged(torch.from_numpy(theta), batch), trained])
    for alone, together in zip(*found, strict=True):
        np.testing.assert_allclose(together, alone, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [WeightType.FLOAT32, WeightType.BFLOAT16], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("saved", COUNTED_ON, indirect=True)
def test_an_architecture_that_does_not_tell_texts_in_a_row_apart_is_refused(saved, dtype, request):
    kind = request.node.callspec.params["saved"]
    with pytest.raises(
        ConfigError, match=rf"model.packing: found true for .*architecture \({kind}\) does not tell texts that share a row apart"
    ):
        models.load(replace(config_for(saved, causal=True).model, packing=True, dtype=dtype), 0)


@pytest.mark.parametrize("saved", ["gemma2, sliding and full layers", "phi", "opt"], indirect=True)
def test_a_vocabulary_in_blocks_gives_the_losses_slopes_and_gradients_of_the_whole_one(saved, monkeypatch):
    """Gemma's bound on scores, biases, a body inside a body; blocks of 97 tokens, the last one shorter."""
    model = models.load(config_for(saved, causal=True).model, 0)
    theta = model.initial_parameters(3) + 0.02 * noise.gaussian(4, 0, model.layout.size)
    examples = model.encode(["one text", "another text, a longer one"], None, [], ["films", "books and more"])
    device, points = TorchForward(model, examples, range(2), 1e3), np.stack([theta, 1.5 * theta, -theta])
    direction = noise.gaussian(5, 0, len(theta))[None]

    def found():
        slopes, estimate = device.differentiate([0, 1])[0](theta, direction), device.estimate(theta, [0, 1], None)
        judged = model.judged(torch.from_numpy(theta), model.batch(examples, [0, 1]))
        return device.evaluate([0, 1])[0](points), *slopes, *estimate, *judged, theta - device.train(theta, [[0, 1]], 1.0)[0]

    expected = found()
    blocks = list[int]()
    own = TokenScores.of
    monkeypatch.setattr(TokenScores, "of", lambda *given: blocks.append(len(given[2])) or own(*given))
    monkeypatch.setattr(token_scores, "WHOLE_MIB", 0)
    monkeypatch.setattr(token_scores, "block_width", lambda _: 97)
    for seen, whole in zip(found(), expected, strict=True):
        np.testing.assert_allclose(seen, whole, rtol=2e-5, atol=2e-6)
    assert set(blocks) == {97, 260 - 2 * 97}


@pytest.mark.parametrize("saved", [*CAUSAL, *ENCODERS], indirect=True)
def test_noise_that_is_streamed_into_every_weight_gives_the_loss_of_a_moved_copy(saved, request):
    """Tied tables, fused projections, norms, position embeddings: whatever a network does with its weights."""
    causal = request.node.callspec.params["saved"] in CAUSAL
    config = config_for(saved, causal=causal).model
    config = replace(config, adapter=AdapterKind.FULL, objective=config.objective if causal else Objective.HEAD)
    model = models.load(config, 2)
    theta = model.initial_parameters(3) + 0.02 * noise.gaussian(4, 0, model.layout.size)
    texts = ["one text", "another text, a longer one"]
    examples = model.encode(texts, None, [0, 1], ["films", "books and more"] if causal else None)
    device, before = TorchForward(model, examples, range(2), None), theta.copy()
    along, (points, _) = device.evaluate_along([0, 1]), device.evaluate([0, 1])
    (there,), shifts = points(theta[None]), list[float]()
    for direction in (Noise(3, 5), Noise(3, 6, Distribution.RADEMACHER)):
        for scale in (0.05, -0.05):
            (expected,) = points((theta + np.float32(scale) * direction.values(len(theta)))[None])
            assert along(theta, direction, scale) == pytest.approx(expected, rel=2e-5)
            shifts.append(abs(expected - there))
    assert max(shifts) > 100 * 2e-5 * there, "the noise matters"
    assert np.array_equal(theta, before), "θ is only read"


@pytest.mark.parametrize("saved", ["opt"], indirect=True)
def test_every_weight_is_trained_where_it_lies_and_read_back_by_plain_transformers(saved, tmp_path):
    """SGD along signs: devices move one array of their own, and a run that was cut short ends with the same bits."""
    config = config_for(saved, causal=True, arm=ArmName.MEZO_FL)
    config = replace(
        config,
        model=replace(config.model, adapter=AdapterKind.FULL),
        optimizer=OptimizerConfig(kind=OptimizerKind.SGD),
        arm=replace(config.arm, distribution=Distribution.RADEMACHER, learning_rate=1e-3, queries=2),
        num_rounds=3,
    )
    run = cooperllm.run(config, tmp_path / "run")
    theta, files = replayed(run.path), RunDirectory(run.path)
    host, start = assemble(files).devices(), assemble(files).start
    assert host._in_place
    assert not np.array_equal(theta, start.theta)
    two = replace(config, num_rounds=2)
    cooperllm.resume(cooperllm.run(two, tmp_path / "two").path)
    assert [update.theta_hash for update in RunDirectory(tmp_path / "two").updates()] == [
        update.theta_hash for update in files.updates()[:2]
    ]
    plain = transformers.AutoModelForCausalLM.from_pretrained(str(run.export(tmp_path / "export")))
    model = Material(config).model
    batch = model.batch(model.encode(["one text"], None, [], ["films"]), [0])
    with torch.inference_mode():
        logits = plain(input_ids=batch.token_ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.places]
        torch.testing.assert_close(model.scores(torch.from_numpy(theta.copy()), batch), logits.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("saved", ["gpt2"], indirect=True)
def test_layers_that_match_nothing_are_refused_with_those_there_are(saved):
    config = replace(config_for(saved, causal=True).model, target_modules=("q_proj",))
    with pytest.raises(
        ConfigError, match=r"model.target_modules: found \['q_proj'\], expected names of linear layers of .*\['c_attn', 'c_fc', 'c_proj'\]"
    ):
        models.load(config, 0)
