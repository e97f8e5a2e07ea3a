"""The notebook, run from its first cell to its last by Jupyter's own client, in a folder with nothing else in it."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"


def test_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch):
    # The package is installed, and the notebook is where a checkout has it.
    (tmp_path / "launch").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "launch")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    insertions = nbformat.v4.new_code_cell(
        "import dataclasses\nprint(json.dumps({'answer': answer.text, 'routed_answer': routed.text,"
        " 'kept': [one.selected_tokens for one in answer.reattention],"
        " 'routed': [one.selected_tokens for one in routed.reattention], 'tokens': insertion.visual_tokens,"
        " 'package': qwenla_jax.__file__, 'things': [[one.size, one.color, one.shape] for one in scene.objects],"
        " 'checks': [check(answer), check(routed), check(dataclasses.replace(answer, sections=[]))]}))"
    )
    notebook.cells.append(insertions)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "launch")}}).execute()

    result = json.loads(insertions.outputs[0].text)
    assert result["answer"].strip() and "<REFLECTION>" in result["answer"]
    # A scene of 112 x 112 pixels has 4 x 4 visual tokens of 28 x 28.
    assert result["tokens"] == 16
    assert set(result["kept"]) == {16} and set(result["routed"]) == {4}
    assert Path(result["package"]).is_relative_to(ROOT)

    (right,) = (color for size, color, shape in result["things"] if (size, shape) == ("big", "triangle"))
    for text, message in zip([result["answer"], result["routed_answer"], ""], result["checks"], strict=True):
        conclusion = text.rpartition("<CONCLUSION>")[2].partition("</CONCLUSION>")[0].strip() or "nothing"
        verdict = "right" if conclusion == right else f"wrong: the right answer is {right}"
        assert message == f"{conclusion} is {verdict}"
    assert any("CPU runtime: [" in out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))

    workdir = tmp_path / "runs" / "notebook"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/reward" in row] == list(range(1, 9))
    assert (workdir / "hf" / "model.safetensors").is_file()
    with Image.open(workdir / "rewards.png") as image:
        assert min(image.size) > 200 and len(image.convert("RGB").getcolors(2**20)) > 10
    kinds = {kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
