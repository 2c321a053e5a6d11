"""What the README and the docs say, run: Python blocks in order, make targets and shell commands by name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


EXAMPLES = [
    pytest.param(code, id=f"{document}-{i}")
    for document in ("README.md", "docs/numerics.md")
    for i, code in enumerate(blocks(document, "python"))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_the_reproducible_page_runs_as_one(capsys):
    exec(compile("\n".join(blocks("docs/reproducible.md", "python")), "example", "exec"), {"__name__": "example"})
    assert re.fullmatch(r"[0-9a-f]{16}\n", capsys.readouterr().out)


def test_the_page_on_each_samples_gradient_runs_as_one(capsys):
    exec(compile("\n".join(blocks("docs/per-sample.md", "python")), "example", "exec"), {"__name__": "example"})
    assert "of the wrong labels" in capsys.readouterr().out


def test_the_training_page_runs_as_one(tmp_path, monkeypatch):
    """But for TensorBoard's part, which tests/peers runs."""
    monkeypatch.chdir(tmp_path)
    code = [block for block in blocks("docs/training.md", "python") if "gpuback.tensorboard" not in block]
    exec(compile("\n".join(code), "example", "exec"), {"__name__": "example"})


def test_the_first_example_is_twenty_lines_of_code():
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def commands() -> list[str]:
    """Every command in a shell block of the README, without its comment."""
    lines = [line.split("#")[0].strip() for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)\b", " ".join(re.findall(r"`[^`]+`|^make .*$", text, re.MULTILINE))))
    assert {"train", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_command_line_examples_run(tmp_path):
    pytest.importorskip("typer")
    rows = "".join(f"{i % 5},{i},{100 + 3 * i % 7}.5\n" for i in range(40))
    (tmp_path / "data.csv").write_text("rooms,age,price\n" + rows)
    ran = 0
    for command in commands():
        if command.startswith("gpuback"):
            arguments = [sys.executable, "-m", *command.split()]
            done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran == 5


def test_relative_links_lead_somewhere():
    pages = ("numerics", "reproducible", "scikit-learn", "training", "pytorch", "onnx", "per-sample")
    for document in ("README.md", "CONTRIBUTING.md", "kernels/README.md", *(f"docs/{page}.md" for page in pages)):
        path = ROOT / document
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{document}: {link}"
