"""The house itself: names, documents, layers and budgets."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import cooperllm

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "cooperllm"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(cooperllm.__path__, "cooperllm.")
    if found.name != "cooperllm.__main__"
]


def public_functions():
    for module in MODULES:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


def test_public_names_are_exactly_the_documented_ones():
    assert cooperllm.__all__ == ["ArmName", "Run", "RunConfig", "compare", "export", "recipe", "resume", "run"]
    assert all(hasattr(cooperllm, name) for name in cooperllm.__all__)


@pytest.mark.parametrize("function", list(public_functions()))
def test_a_public_function_says_what_it_takes_and_gives(function):
    text = inspect.getdoc(function) or ""
    assert text, "no docstring"
    signature = inspect.signature(function)
    is_command = function.__module__ in {"cooperllm.cli", "cooperllm.deployment_commands"}
    if signature.parameters and not is_command and len(text.splitlines()) > 1:
        assert "Args:" in text
    if signature.return_annotation is not None and len(text.splitlines()) > 1:
        assert re.search(r"Returns:|Yields:", text)


@pytest.mark.parametrize("module", [m for m in MODULES if m.__name__.startswith("cooperllm.algorithm.")], ids=lambda m: m.__name__)
def test_every_function_of_the_algorithm_has_an_example(module):
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            assert "Example:" in (value.__doc__ or ""), f"{module.__name__}.{name}"


def test_every_function_and_test_named_in_the_algorithm_table_exists():
    text = (ROOT / "docs" / "algorithm.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    assert named <= TESTS
    for module_name, attribute in re.findall(r"`(\w+)\.(\w+)(?:\.\w+)?`", text):
        candidates = [m for m in MODULES if m.__name__.endswith(f".{module_name}")]
        owners = [value for m in MODULES for key, value in vars(m).items() if key == module_name]
        assert any(hasattr(owner, attribute) for owner in candidates + owners), f"{module_name}.{attribute}"


def test_the_readme_names_only_files_that_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_file_is_a_drawer():
    assert not {"utils", "helpers", "common", "misc", "manager"} & {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_file_says_what_it_is_and_promises_nothing(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError", text)


def test_no_file_outgrows_a_reader():
    lengths = {str(file.relative_to(SOURCE)): len(file.read_text().splitlines()) for file in FILES}
    longest = dict.fromkeys(lengths, 420) | {"messages.py": 500}  # all that crosses a wall is in one file, with what each field means
    assert {name: length for name, length in lengths.items() if length > longest[name]} == {}


def test_functions_are_short():
    lengths = sorted(
        node.end_lineno - node.body[0].end_lineno if ast.get_docstring(node) else node.end_lineno - node.lineno
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(0.9 * len(lengths))] <= 40


def test_only_one_file_knows_each_engine():
    owners = {
        "flwr": {f"link/{name}.py" for name in ("flower", "envelope", "fleet_server", "fleet_node", "supernode")},
        "transformers": {"pretrained.py"},
        "peft": {"pretrained.py"},
        "datasets": {"data.py"},
        "accelerate": {"accelerated.py"},
    }
    for engine, allowed in owners.items():
        users = {
            str(file.relative_to(SOURCE)) for file in FILES if re.search(rf"^\s*(import|from) {engine}\b", file.read_text(), re.MULTILINE)
        }
        assert users == allowed, engine


def test_the_tests_never_look_outside_the_project():
    for file in (ROOT / "tests").rglob("*.py"):
        assert "../shared" not in file.read_text().replace('"../shared" not in', ""), file
