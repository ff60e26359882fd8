"""Causal models that learn what to say: Hugging Face's own loss as the judge, chat templates, data that will not do, whole runs.

Run: pytest tests/system/test_next_tokens.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from typer.testing import CliRunner

import cooperllm
from cooperllm import models, pretrained
from cooperllm.algorithm import replay, zeroth_order
from cooperllm.answers import judge_of
from cooperllm.assembly import assemble
from cooperllm.cli import app
from cooperllm.cloud import GuideMaker
from cooperllm.config import (
    AdapterKind,
    ArmName,
    DeviceScore,
    EngineName,
    ModelConfig,
    Objective,
    Partition,
    RuntimeName,
    SlopeMethod,
    Variant,
    from_plain,
    to_plain,
)
from cooperllm.device.torch_forward import TorchForward
from cooperllm.errors import ConfigError
from cooperllm.evaluation import evaluate
from cooperllm.listening import Listener
from cooperllm.packaging import write_package
from cooperllm.prompts import frame_of
from cooperllm.run_directory import RunDirectory

TEXTS = ("Who wrote it?", "What do clouds do when they meet?", "Name two.")
SAID = ("Nobody knows.", "Rain.", "This and that, and a third one.")
TINY = ModelConfig(
    name="tiny-llama",
    objective=Objective.NEXT_TOKEN,
    prompt="Q: {text} A:",
    target_modules=("q_proj", "v_proj"),
    last_layers=1,
    max_tokens=80,
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def moved(model):
    theta = torch.from_numpy(model.initial_parameters(3))
    return theta + 0.02 * torch.sin(torch.arange(len(theta)))


def loss_of(model, theta, examples, indices=range(3)):
    batch = model.batch(examples, indices)
    return torch.nn.functional.cross_entropy(model.scores(theta, batch), batch.labels)


def tiny(arm=ArmName.FEEDBACK, **changes):
    config = cooperllm.recipe("tiny").with_arm(arm)
    source = replace(config.data.private, completion_column="domain")
    return replace(
        config,
        engine=EngineName.LOOPBACK,
        model=replace(config.model, objective=Objective.NEXT_TOKEN, prompt="{text} This is about", label_words=()),
        data=replace(config.data, public=source, private=source),
        **changes,
    )


@pytest.mark.parametrize("caches_prefix", [True, False])
def test_the_loss_is_the_one_that_transformers_computes_with_the_prompt_masked(tmp_path, caches_prefix):
    """Through plain PEFT, labels -100 wherever nothing is to be learned."""
    model = models.load(replace(TINY, caches_prefix=caches_prefix), 0)
    theta, examples = moved(model), model.encode(TEXTS, None, [], SAID)
    model.save_adapter(theta.numpy(), tmp_path, ())
    plain = PeftModel.from_pretrained(pretrained.tiny_llama(causal=True)[0], str(tmp_path)).eval()
    width = max(map(len, examples.token_ids))
    ids, labels = torch.zeros(3, width, dtype=torch.int64), torch.full((3, width), -100)
    mask = torch.zeros(3, width, dtype=torch.int64)
    for number, (row, start) in enumerate(zip(examples.token_ids, examples.starts, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row), 1
        labels[number, start : len(row)] = torch.from_numpy(row[start:])
    with torch.inference_mode():
        expected = plain(input_ids=ids, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(loss_of(model, theta, examples), expected, rtol=0, atol=1e-5)
    assert not (tmp_path / "labels.json").exists()


def test_what_is_said_ends_with_the_end_of_text_and_begins_behind_the_prompt():
    model = models.load(TINY, 0)
    examples = model.encode(TEXTS, None, [], SAID)
    read = [model._tokenizer.decode(row[start:]) for row, start in zip(examples.token_ids, examples.starts, strict=True)]
    assert read == [f"{said}</s>" for said in SAID]
    assert model._tokenizer.decode(examples.token_ids[0][: examples.starts[0]]) == "Q: Who wrote it? A:"


@pytest.mark.parametrize("adapter", [AdapterKind.LORA, AdapterKind.IA3, AdapterKind.FULL])
def test_a_devices_gradient_is_that_of_back_propagation(adapter):
    """Completions of unlike lengths, in parts and whole: every token counts the same."""
    targets = {AdapterKind.LORA: ("q_proj", "v_proj"), AdapterKind.IA3: ("k_proj", "v_proj"), AdapterKind.FULL: ()}[adapter]
    model = models.load(replace(TINY, adapter=adapter, target_modules=targets, last_layers=None), 0)
    theta, examples = moved(model), model.encode(TEXTS, None, [], SAID)
    point = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(model, point, examples), point)
    device = TorchForward(model, examples, range(3), None, 1.0)
    np.testing.assert_allclose(theta.numpy() - device.train(theta.numpy(), [range(3)], 1.0)[0], expected, atol=1e-6)
    if adapter is AdapterKind.FULL:
        return
    for budget in (None, 1e-9):  # all texts at once; one by one
        found, loss = TorchForward(model, examples, range(3), budget, 1.0).estimate(theta.numpy(), range(3), None)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert loss == pytest.approx(float(loss_of(model, theta, examples)), abs=1e-5)


def test_the_clouds_gradient_is_that_of_its_completions_and_its_basis_draws_a_token_for_each():
    model = models.load(TINY, 0)
    theta, examples = moved(model), model.encode(TEXTS, None, [], SAID)
    maker = GuideMaker(model, examples, 3, 1)
    point = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(model, point, examples), point)
    found, _ = maker.gradient(theta.numpy(), 7)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    basis = maker.basis(theta.numpy(), 7, 3)
    assert basis.shape == (3, len(theta))
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-4)
    assert maker.has_every_class


@pytest.mark.parametrize("arm", [ArmName.FEEDBACK, ArmName.MEASURED, ArmName.MEZO_FL, ArmName.FEDAVG_BP, ArmName.CLOUD_ONLY])
def test_a_run_learns_replays_and_is_judged_by_its_loss(tmp_path, arm):
    run = cooperllm.run(tiny(arm, num_rounds=6), tmp_path / "run")
    files = RunDirectory(run.path)
    replica = assemble(files).start
    for update in files.updates():
        replica = replay.apply(replica, update, files.config().optimizer)
    assert replica.state_hash == files.updates()[-1].theta_hash
    entry = run.summary["arms"][arm.value]
    (_, first), *_, (_, last) = entry["loss_by_round"]
    assert last < first
    assert (entry["judged_by"], entry["final_loss"]) == ("loss", last)
    page = (run.path / "report.html").read_text()
    assert "less loss after fewer rounds" in page
    assert f"ends at a loss of {last:.3f}" in page


@pytest.mark.parametrize("caches_prefix", [True, False])
def test_texts_that_share_rows_have_the_clouds_gradient_of_texts_alone(caches_prefix):
    """The frozen prefix is computed for each text alone, so that its states are the same bits."""
    texts, said = ("Who?", "What do clouds do when they meet?", "Two."), ("No.", "Rain and more rain, all day long.", "A.")
    found, states = list[np.ndarray](), list[dict]()
    for packing in (False, True):
        model = models.load(replace(TINY, packing=packing, caches_prefix=caches_prefix), 0)
        examples = model.encode(texts, None, [], said)
        assert len(model.batch(examples, range(3)).token_ids) == (2 if packing else 3)
        found.append(GuideMaker(model, examples, 3, 1).gradient(moved(model).numpy(), 7)[0])
        states.append(examples.states)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    assert len(states[1]) == (3 if caches_prefix else 0)
    assert all(torch.equal(states[0][number], states[1][number]) for number in states[1])


def test_a_package_of_texts_that_share_rows_is_refused(tmp_path):
    model = models.load(replace(TINY, packing=True), 0)
    with pytest.raises(ConfigError, match=r"model.packing: found true, expected false for a package"):
        write_package(model, model.initial_parameters(0), tmp_path / "package", label_names=(), variant=Variant.FP32, seed=0)
    assert not (tmp_path / "package").exists()


def test_devices_that_use_packages_share_no_rows():
    config = tiny()
    with pytest.raises(ConfigError, match=r"model.packing: found True, expected false for the runtime onnx"):
        replace(config, model=replace(config.model, packing=True), runtime=RuntimeName.ONNX)


def test_texts_alone_are_learned_without_a_prompt(tmp_path):
    """Language modelling on whatever devices hold."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": f"the {number} sheep are counted"}) + "\n" for number in range(40)))
    options = f"--private {file} --public {file} --text-column body --partition iid --rounds 2 --out {tmp_path / 'run'}"
    settings = "--set model.objective=next-token --set model.label_words=[] --set data.private.label_column=null"
    result = CliRunner().invoke(app, ["run", "tiny", *options.split(), *settings.split(), "--set", "data.public.label_column=null"])
    assert result.exit_code == 0, result.output
    assert "final" in result.output


def test_a_completion_column_says_it_all_on_the_command_line(tmp_path):
    arguments = ["run", "tiny", "--completion-column", "domain", "--prompt", "{text} is of", "--partition", "iid", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    config = RunDirectory(tmp_path / "run").config()
    assert (config.model.objective, config.model.prompt, config.data.private.label_column) == (Objective.NEXT_TOKEN, "{text} is of", None)


# Chat templates.


def with_template(template):
    _, tokenizer = pretrained.tiny_llama(causal=True)
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_template_is_what_stands_around_text_and_completion():
    """The same tokens as the template gives for the whole conversation."""
    tokenizer = with_template(TEMPLATE)
    frame = frame_of(replace(TINY, prompt="{text}", uses_chat_template=True), tokenizer)

    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    conversation = [{"role": "user", "content": "Who? {you}"}, {"role": "assistant", "content": "Me."}]
    whole = tokens(tokenizer.apply_chat_template(conversation, tokenize=False))
    prompt, is_cut = frame.prompt_ids(tokens, tokenizer.decode, "Who? {you}", "", 99)
    assert [*prompt, *tokens("Me."), *frame.end] == whole
    assert not is_cut
    assert tokenizer.decode(frame.end) == "</s>"


def test_braces_of_a_chat_template_are_no_fields():
    frame = frame_of(replace(TINY, prompt="{text}", uses_chat_template=True), with_template("{{ '{x}' }}" + TEMPLATE))
    assert frame.prompt.format(text="hi", text2="") == "{x}<user>hi</s><assistant>"


def test_a_chat_template_takes_both_texts_of_a_pair():
    frame = frame_of(replace(TINY, prompt="{text} or {text2}?", uses_chat_template=True), with_template(TEMPLATE))
    assert frame.prompt.format(text="this", text2="that") == "<user>this or that?</s><assistant>"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "no chat template in the tokeniser of 'tiny-llama'; give --prompt instead"),
        ("{% for message in messages %}{{ message['content'][::-1] }}{% endfor %}", "does more than put text and completion in place"),
        (TEMPLATE.replace("<assistant>", "<other>"), "does more than put text and completion in place"),
    ],
)
def test_a_chat_template_that_is_missing_or_does_more_is_refused(template, sentence):
    with pytest.raises(ConfigError, match=sentence):
        frame_of(replace(TINY, prompt="{text}", uses_chat_template=True), with_template(template))


# What a trained model says.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trained for long enough to know that "hotels" follows: one text, one answer."""
    directory = tmp_path_factory.mktemp("finished")
    file = directory / "pairs.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {number}", "said": "ok"}) + "\n" for number in range(40)))
    source = replace(tiny().data.private, name=str(file), label_column=None, completion_column="said")
    config = tiny(num_rounds=40, evaluate_every=20, checkpoint_every=20)
    federation = replace(config.federation, partition=Partition.IID)
    config = replace(config, data=replace(config.data, public=source, private=source), federation=federation)
    return cooperllm.run(replace(config, arm=replace(config.arm, learning_rate=0.05)), directory / "run")


def test_a_trained_model_says_what_plain_peft_says_with_its_adapter(finished):
    """Greedy, the end of text included: what `transformers` generates from the export."""
    result = CliRunner().invoke(app, ["chat", str(finished.path), "text 3"])
    assert result.exit_code == 0, result.output
    base, tokenizer = pretrained.tiny_llama(causal=True)
    plain = PeftModel.from_pretrained(base, str(finished.path / "adapter")).eval()
    ids = torch.tensor([tokenizer("text 3 This is about", add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        expected = plain.generate(input_ids=ids, max_new_tokens=128, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    assert result.output.rstrip("\n") == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert "ok" in result.output


def test_chat_asks_for_line_after_line_until_there_is_no_more(finished):
    result = CliRunner().invoke(app, ["chat", str(finished.path), "--max-new-tokens", "3"], input="text 1\n\ntext 2\n")
    assert result.exit_code == 0, result.output
    assert result.output.count(">") == 4


def test_a_model_of_classes_names_them_likeliest_first(tmp_path):
    run = cooperllm.run(replace(cooperllm.recipe("tiny").config, engine=EngineName.LOOPBACK, num_rounds=1), tmp_path / "run")
    result = CliRunner().invoke(app, ["chat", str(run.path), "A stirring film."])
    found = [float(part.split()[-1].rstrip("%")) for part in result.output.strip().split(", ")]
    assert {part.split()[0] for part in result.output.strip().split(", ")} == {"negative", "positive"}
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(100, abs=0.11)  # each rounded to a tenth


def test_answers_are_judged_beside_what_was_to_be_said(finished):
    """A model that answers every text with the one right word: all of them exact, and every target of theirs the likeliest."""
    found = evaluate(finished.path, max_texts=3)
    assert (found.exact_match, found.rouge_l, found.num_answers, found.accuracy) == (1, 1, 3, 1)
    assert found.loss == pytest.approx(finished.summary["arms"]["feedback"]["final_loss"], rel=1e-6)
    result = CliRunner().invoke(app, ["evaluate", str(finished.path), "--max-texts", "2", "--max-new-tokens", "1"])
    assert result.exit_code == 0, result.output
    assert "exact match 0.0%, ROUGE-L 0.000" in result.output  # one byte of two
    assert f"perplexity {found.perplexity:.2f}" in result.output


def test_a_model_of_classes_is_judged_by_accuracy(tmp_path):
    run = cooperllm.run(replace(cooperllm.recipe("tiny").config, engine=EngineName.LOOPBACK, num_rounds=1), tmp_path / "run")
    entry = run.summary["arms"]["feedback"]
    result = CliRunner().invoke(app, ["evaluate", str(run.path)])
    assert result.output.strip() == f"40 test texts: accuracy {entry['final_accuracy']:.1%}, loss {entry['final_loss']:.4f}"


def test_devices_measure_scores_of_what_the_model_says(finished):
    """At the end of training every answer is right, at the start none; slopes between the two points are those of the score."""
    listener = Listener.of(finished.path)
    model, theta = listener.model, listener.theta
    material = assemble(RunDirectory(finished.path)).material
    start = model.initial_parameters(0)
    for score in (DeviceScore.EXACT_MATCH, DeviceScore.F1):
        device = TorchForward(model, material.private, range(6), None, 1.0, judge_of(score))
        evaluate_, at_once = device.evaluate([0, 2, 4])
        assert at_once == 1
        np.testing.assert_array_equal(evaluate_(np.stack([theta, start])), [0, 1])
        half = (theta + start) / 2
        (slope,) = zeroth_order.slopes(evaluate_, half, [(theta - start) / 2], 1.0, points_per_pass=1)
        assert slope == pytest.approx(-0.5)  # from one to nothing over two half-steps


def test_answers_are_those_of_plain_generation(finished):
    listener = Listener.of(finished.path)
    examples = listener.model.encode(["text 3", "text 5"], None, [], ["ok", "no"])
    assert listener.model.answers(listener.theta, examples, [1, 0]) == [("no", "ok"), ("ok", "ok")]


@pytest.mark.parametrize("arm", [ArmName.MEZO_FL, ArmName.MEASURED])
def test_a_run_on_a_score_without_a_derivative_replays(tmp_path, arm):
    config = tiny(arm, num_rounds=2, device_score=DeviceScore.F1)
    config = replace(config, federation=replace(config.federation, batch_size=2), arm=replace(config.arm, queries=2))
    run = cooperllm.run(config, tmp_path / "run")
    files = RunDirectory(run.path)
    replica = assemble(files).start
    for update in files.updates():
        replica = replay.apply(replica, update, files.config().optimizer)
    assert replica.state_hash == files.updates()[-1].theta_hash
    assert all(0 <= row["private_loss"] <= 1 for row in files.rounds())


@pytest.mark.parametrize(
    ("arm", "changes", "sentence"),
    [
        (ArmName.FEEDBACK, {}, "device_score: found 'f1', expected loss for the arm feedback"),
        (ArmName.MEZO_FL, {"runtime": RuntimeName.ONNX}, "expected loss, or --runtime torch and two-sided slopes"),
        (ArmName.MEZO_FL, {"slope_method": SlopeMethod.FORWARD_MODE}, "expected loss, or --runtime torch and two-sided slopes"),
    ],
)
def test_a_score_that_nothing_could_measure_is_refused(arm, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tiny(arm, device_score=DeviceScore.F1, **changes)


def test_answers_are_compared_with_completions():
    with pytest.raises(ConfigError, match="device_score: found 'f1', expected loss, or the objective next-token with a completion column"):
        replace(cooperllm.recipe("tiny").with_arm(ArmName.MEZO_FL), device_score=DeviceScore.F1)


def test_nothing_to_answer_is_refused(finished):
    result = CliRunner().invoke(app, ["chat", str(finished.path), " "])
    assert "text: found nothing" in str(result.exception)


def test_an_export_has_a_card_that_the_hub_reads_and_that_tells_the_runs_own_figures(finished, tmp_path):
    finished.export(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    entry = finished.summary["arms"]["feedback"]
    assert (card.data.library_name, card.data.pipeline_tag, card.data.base_model) == ("peft", "text-generation", "tiny-llama")
    assert f"| loss on held-out texts | {entry['final_loss']:.3f} |" in card.text
    assert "| rounds | 40 of 40, 3 devices each |" in card.text
    assert "The gradient of the adapter over a batch, rounded" in card.text
    assert "{{" not in card.text


def test_a_hub_out_of_reach_is_said_and_the_adapter_is_there(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["export", str(finished.path), str(tmp_path / "adapter"), "--push-to-hub", "me/mine"])
    assert "'me/mine' could not be written" in str(result.exception)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


# What will not do.


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("model", "prompt"), "no text", "model.prompt: found 'no text'"),
        (("model", "objective"), "head", "data.public.completion_column: found 'domain', expected none for the objective head"),
        (("arm", "map_examples"), 64, "arm.map_examples: found 64, expected 0 for the objective next-token"),
    ],
)
def test_settings_that_do_not_go_with_next_tokens_are_refused(path, value, sentence):
    plain = to_plain(tiny())
    plain[path[0]][path[1]] = value
    with pytest.raises(ConfigError, match=sentence):
        from_plain(plain, where="here")


def test_a_chat_template_is_for_next_tokens():
    with pytest.raises(ConfigError, match=r"model.uses_chat_template: found True, expected false for the objective head"):
        ModelConfig(uses_chat_template=True)


def test_empty_completions_are_refused_with_their_row(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"text": "a", "said": said} for said in ["yes", " ", "no", None] * 10]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = replace(tiny().data.private, name=str(file), label_column=None, completion_column="said")
    config = replace(tiny(), data=replace(tiny().data, private=source, public=source))
    with pytest.raises(ConfigError, match=r"completions in column 'said' are empty, first that in row \d+; fill them in"):
        cooperllm.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dirichlet_partition_needs_labels(tmp_path):
    source = replace(tiny().data.private, label_column=None)
    config = replace(tiny(), data=replace(tiny().data, private=source, public=source))
    with pytest.raises(ConfigError, match="found dirichlet and texts without labels, expected iid or column"):
        cooperllm.run(config, tmp_path / "run")
    config = replace(config, federation=replace(config.federation, partition=Partition.IID), num_rounds=1)
    assert cooperllm.run(config, tmp_path / "run").summary["num_rounds"] == 1


def test_an_encoder_has_no_next_tokens():
    with pytest.raises(ConfigError, match=r"'minilm' .* expected a causal language model"):
        models.load(ModelConfig(objective=Objective.NEXT_TOKEN, prompt="{text}"), 0)
