"""README and docs say what is so: Python blocks and commands run, and targets, extras, modules and files exist."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import gpuback
from gpuback._cli import main as cli
from gpuback._core.activations import ACTIVATIONS, Activation

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}

RUN_ELSEWHERE = {
    "docs/backprop.md": "test_docs_backprop.py",
    "docs/pytorch.md": "tests/peers",
    "docs/onnx.md": "tests/peers",
    "docs/scikit-learn.md": "tests/peers",
}
PRINTED = {"docs/reproducible.md": r"^[0-9a-f]{16}\n$", "docs/per-sample.md": r"of the wrong labels"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT[page], re.MULTILINE | re.DOTALL)


def run(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_each_example_of_the_readme_runs_by_itself(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(code)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in RUN_ELSEWHERE and page != "README.md" and blocks(page, "python")],
)
def test_the_examples_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    """But for those that need TensorBoard or PyTorch, which tests/peers runs."""
    monkeypatch.chdir(tmp_path)
    run(
        "\n".join(code for code in blocks(page, "python") if not re.search(r"gpuback\.tensorboard|^import torch", code))
    )
    assert re.search(PRINTED.get(page, ""), capsys.readouterr().out)


def test_the_first_example_is_twenty_lines_of_code():
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def commands() -> list[str]:
    """Every command in a shell block, once, without its comment."""
    lines = [
        line.split("#")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()
    ]
    return [line for line in dict.fromkeys(lines) if line]


def test_the_command_line_examples_run(tmp_path, monkeypatch, capsys):
    """And the first one comes to what the README says."""
    pytest.importorskip("typer")
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i % 5},{i if i % 9 else ''},{100 + 3 * i % 7}.5\n" for i in range(40))
    (tmp_path / "data.csv").write_text("rooms,age,price\n" + rows)
    printed = {}
    for command in commands():
        if command.startswith("gpuback"):
            code = cli.main(command.split()[1:])
            printed[command] = capsys.readouterr()
            assert code == 0, f"{command}\n{printed[command]}"
    assert len(printed) == 7
    accuracy = re.search(r"held-out accuracy +([\d.]+) %", printed["gpuback train iris --hidden 16 --epochs 100"].out)
    assert float(accuracy[1]) >= 95
    assert (tmp_path / "prices.csv").read_text().startswith("price\n")


def test_the_activation_of_the_worked_example_passes_the_gradient_check(monkeypatch):
    namespace = {}
    exec(blocks("CONTRIBUTING.md", "python")[0], namespace)
    row = Activation("isru", 15, "h", "glorot", namespace["isru"], namespace["isru_backward"])
    monkeypatch.setitem(ACTIVATIONS, "isru", row)
    net = gpuback.MLP([3, 8, 5, 2], activation="isru", backend="numpy", seed=0)
    x = np.random.default_rng(0).normal(size=(20, 3))
    assert gpuback.check_gradients(net, x, x.argmax(axis=1) % 2).passed
    assert net.trace([[np.inf, 0, 0]], [0]).h[1].max() == 1


def test_paths_that_are_named_exist():
    named = re.findall(r"`((?:gpuback|kernels|tests|docs|benchmarks|\.ci|\.github)/[\w./]*)`", TEXT["CONTRIBUTING.md"])
    assert "gpuback/_core" in named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    unfenced = [re.sub(r"^```.*$", "", text, flags=re.MULTILINE) for text in TEXT.values()]
    code = [found for text in unfenced for found in re.findall(r"`[^`]+`|^make .*$", text, re.MULTILINE)]
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", " ".join(code)))
    assert {"train", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_extras_exist():
    with open(ROOT / "pyproject.toml", "rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"]
    named = {
        name for text in TEXT.values() for found in re.findall(r"'\.\[(.*?)\]'", text) for name in found.split(",")
    }
    assert {"cli", "sklearn", "torch", "onnx", "tensorboard", "cuda12", "cuda13"} <= named <= set(known)


def test_nothing_is_installed_from_an_index_under_gpubacks_name():
    assert not [page for page, text in TEXT.items() if re.search(r"pip install[^\n#`]*\bgpuback", text)]


def test_modules_that_commands_run_exist():
    named = {name for text in TEXT.values() for name in re.findall(r"python -m ((?:gpuback|benchmarks)[\w.]*)", text)}
    assert "gpuback" in named
    missing = [name for name in named if importlib.util.find_spec(name) is None]
    assert not missing


def test_the_site_loads_nothing_from_the_internet():
    for name in ("mkdocs.yml", "docs/site/mathjax.js", "docs/site/site.css"):
        assert "https:" not in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "kernels/README.md"])
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[)#]", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_lines_fit_into_120_characters(page):
    """But for tables, and what `make bench-report` writes."""
    text = re.sub(r"<!-- benchmark -->.*<!-- /benchmark -->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
