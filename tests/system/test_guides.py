"""The guides, run: every command and every cell in them, one after the other, in an empty directory.

Run: pytest tests/system/test_guides.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "guides"
GUIDES, NOTEBOOKS = sorted(FOLDER.glob("*.md")), sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_every_command_of_a_guide_works_as_it_stands(guide, tmp_path):
    commands = re.findall(r"^```sh\n(.*?)^```$", guide.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)
    assert len(commands) >= 3
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + "\n".join(commands)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580, check=False)
    words = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{words[-3000:]}"
    assert "Traceback" not in done.stderr + words


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_every_cell_of_a_notebook_runs_and_it_is_kept_without_what_it_said(notebook, tmp_path):
    pages = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in pages.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    nbclient.NotebookClient(pages, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in said), "a picture is drawn"
    assert [output.text for output in said if output.output_type == "stream" and "Traceback" in output.text] == []


def test_the_reference_is_built_from_docstrings(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pdoc",
        "--docformat",
        "google",
        "--output-directory",
        str(tmp_path),
        "cooperllm",
        "cooperllm.comparison",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    assert "Memory for all processes at their peaks" in (tmp_path / "cooperllm" / "comparison.html").read_text()


def test_the_readme_leads_to_every_guide():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf8")
    assert [guide.name for guide in (*GUIDES, *NOTEBOOKS) if f"docs/guides/{guide.name}" not in readme] == []
