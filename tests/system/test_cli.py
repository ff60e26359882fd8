"""What a person types and reads."""

import json
import sys

import pytest

from cooperllm import cli, recipes

TINY = ["--rounds", "2", "--engine", "loopback"]


def typed(monkeypatch, capsys, *words):
    """Runs the command line in this process; returns (status, what it printed)."""
    monkeypatch.setattr(sys, "argv", ["cooperllm", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


def test_a_run_prints_a_table_a_verdict_and_where_the_report_is(monkeypatch, capsys, tmp_path):
    status, text = typed(monkeypatch, capsys, "run", "tiny", *TINY, "--out", "first")
    assert status == 0
    assert "feedback ends at" in text
    assert f"report: {tmp_path / 'first' / 'report.html'}" in text
    assert json.loads((tmp_path / "first" / "config.json").read_text())["num_rounds"] == 2


def test_a_comparison_runs_the_arms_it_was_asked_for(monkeypatch, capsys, tmp_path):
    status, text = typed(monkeypatch, capsys, "compare", "tiny", "--arms", "cloud-only,mezo-fl", *TINY, "--out", "both", "--queries", "3")
    assert status == 0
    assert "mezo-fl" in text
    arms = json.loads((tmp_path / "both" / "summary.json").read_text())["arms"]
    assert {name: arm["queries_per_device_round"] for name, arm in arms.items()} == {"cloud-only": 0, "mezo-fl": 3}


def test_runs_get_directories_of_their_own(monkeypatch, capsys, tmp_path):
    for _ in range(2):
        typed(monkeypatch, capsys, "run", "tiny", *TINY)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-1", "tiny-2"]


def test_a_finished_run_can_be_exported_and_resumed(monkeypatch, capsys, tmp_path):
    typed(monkeypatch, capsys, "run", "tiny", *TINY, "--out", "first")
    assert typed(monkeypatch, capsys, "resume", "first")[0] == 0
    status, text = typed(monkeypatch, capsys, "export", "first", "adapter")
    assert status == 0
    assert "adapter written to adapter" in text
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_options_change_the_settings(monkeypatch, capsys, tmp_path):
    options = {"--seed": "5", "--devices": "8", "--edges": "4", "--devices-per-round": "2", "--batch-size": "3", "--partition": "iid"}
    words = [word for pair in options.items() for word in pair]
    typed(monkeypatch, capsys, "run", "tiny", "--arm", "paper", "--learning-rate", "0.5", *TINY, *words, "--out", "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    federation = config["federation"]
    assert (config["seed"], config["arm"]["name"], config["arm"]["learning_rate"]) == (5, "paper", 0.5)
    assert [federation[key] for key in ("num_devices", "num_edges", "devices_per_round", "batch_size", "partition")] == [8, 4, 2, 3, "iid"]


def test_any_setting_can_be_set_by_its_path(monkeypatch, capsys, tmp_path):
    settings = ["arm.local_steps=1", "federation.label_adjustment=0", "data.public.label_column=null", "data.public.name=generated"]
    status, _ = typed(monkeypatch, capsys, "run", "tiny", *TINY, *[word for pair in settings for word in ("--set", pair)], "--out", "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (status, config["arm"]["local_steps"], config["federation"]["label_adjustment"]) == (0, 1, 0)
    assert config["data"]["public"]["label_column"] is None


def test_label_texts_can_be_chosen_for_any_recipe(monkeypatch, capsys, tmp_path):
    settings = ["model.objective=label-texts", 'model.label_words=["a bad film","a great film, all in all"]']
    status, text = typed(monkeypatch, capsys, "run", "tiny", *TINY, *[word for pair in settings for word in ("--set", pair)], "--out", "x")
    model = json.loads((tmp_path / "x" / "config.json").read_text())["model"]
    assert status == 0, text
    assert (model["objective"], model["label_words"]) == ("label-texts", ["a bad film", "a great film, all in all"])
    assert (tmp_path / "x" / "adapter" / "label_embeddings.safetensors").is_file()


def test_recipes_are_listed_with_a_sentence_each(monkeypatch, capsys):
    _, text = typed(monkeypatch, capsys, "recipes")
    for name in recipes.RECIPES:
        assert f"{name}  " in text


@pytest.mark.parametrize("command", ["run", "compare", "resume", "export", "recipes"])
def test_every_option_has_a_help_text(monkeypatch, capsys, command):
    _, text = typed(monkeypatch, capsys, command, "--help")
    described = [line for line in text.splitlines() if "--" in line and "│" in line]
    assert described
    assert all(len(line.strip("│ ").split("  ")) > 1 for line in described)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "nonsense"), "recipe: found 'nonsense', expected one of demo, "),
        (("run", "tiny", "--devices", "2"), "federation.devices_per_round: found 3, expected 1 to 2, the number of devices"),
        (("run", "tiny", "--rounds", "0"), "num_rounds: found 0, expected >= 1"),
        (("run", "tiny", "--model", "no/such-model"), "'no/such-model' could not be loaded"),
        (("run", "tiny", "--private", "nowhere.csv"), "nowhere.csv does not exist"),
        (("run", "tiny", "--target-modules", "nowhere"), "expected names of linear layers"),
        (("compare", "tiny", "--arms", "measured,magic"), "--arms: found 'magic', expected some of feedback, measured, "),
        (("compare", "tiny", "--rounds-of", "paper=x"), "--rounds-of: found 'paper=x', expected ARM=ROUNDS"),
        (("compare", "tiny", "--seeds", "0,one"), "--seeds: found '0,one', expected whole numbers"),
        (("compare", "tiny", "--seeds", "0,1", "--seed", "2"), "--seeds: found --seed beside it, expected one of them"),
        (("compare", "tiny", "--tune-rounds", "5"), "tune_rounds: found 5, expected >= 1, together with tuning (--tune)"),
        (("run", "tiny", "--set", "arm.local_step=1"), "arm.local_step found, which is no setting"),
        (("run", "tiny", "--set", "nowhere.at.all=1"), "--set: found 'nowhere.at.all=1', expected PATH=VALUE"),
        (("run", "tiny", "--set", "arm.local_steps=9"), "arm.queries: found 5, expected >= 14: three for every two estimates"),
        (("run", "tiny", "--arm", "paper", "--public", "none"), "paper back-propagates on labelled public text"),
        (("resume", "nowhere"), "nowhere is not a run directory"),
        (("export", "nowhere", "adapter"), "nowhere is not a run directory"),
    ],
)
def test_a_mistake_ends_with_a_sentence_and_leaves_nothing_behind(monkeypatch, capsys, tmp_path, words, sentence):
    status, text = typed(monkeypatch, capsys, *words)
    assert status == 1
    assert sentence in " ".join(text.split())
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir()), "a mistake left files behind"
