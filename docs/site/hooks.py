"""What the site is made of: the repository's own Markdown, its links led to pages of the site, and the API's reference.

The documents stay where a reader of the repository looks for them, and link to each other and to the code as files do.
Here each becomes a page; of every file of code that one of them links to, there is a page too. A document that is new
in docs/ needs no entry anywhere: it becomes a how-to page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "tests/emulator/README.md": "emulator.md",
    "benchmarks/results/cpu.md": "benchmarks/cpu.md",
    "benchmarks/results/h200.md": "benchmarks/h200.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Documents outside docs/, and where they stand on the site."""

FOLDERS = {"benchmarks/results": "benchmarks/cpu.md"}
"""What a link to a folder leads to."""

EXPLAINED = ["backprop.md", "numerics.md", "reproducible.md", "kernels.md", "emulator.md"]
"""Pages that say how and why; all others of docs/ say how to."""

API = {
    "networks": ["MLP", "Gradients", "check_gradients", "GradientReport", "backends", "BackendStatus"],
    "training": ["fit", "TrainStep", "History", "LossScaling", "SGD", "Adam", "AdamW", "DivergedError", "schedules"],
    "arrays": ["fused_backward"],
    "others": ["sklearn", "torch", "onnx", "tensorboard"],
    "testing": ["testing"],
    "data": ["datasets"],
    "errors": ["GpubackError", "errors"],
}
"""Pages of the reference, and what they hold: public names and modules of gpuback, those that there are. A public name
that is not here goes on a page of its kin, "more"."""

FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
OWN_NAME = re.compile(r"^from gpuback\S* import \w+ as (\w+)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation."""
    here = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    config.nav = [
        {"Getting started": "index.md"},
        {"How to": [name for name in here if name not in EXPLAINED]},
        {"How and why": EXPLAINED},
        {"Benchmarks": [page for page in ELSEWHERE.values() if page.startswith("benchmarks/")]},
        {"Reference": [f"api/{name}.md" for name in _reference()]},
        {"Project": ["changelog.md", "contributing.md"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that are not in docs/."""
    for place, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    for name, text in _reference().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    for source in sorted({target for file in files.documentation_pages() for target in _sources(file)}):
        code = (ROOT / source).read_text(encoding="utf-8")
        language = "python" if source.endswith(".py") else "cpp"
        text = f"# {source}\n\n~~~~~{language}\n{code}~~~~~\n"
        files.append(File.generated(config, _source_page(source), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A page's text, in which links to files of the repository lead to their pages."""
    origin = _origin(page.file)
    if origin is None:
        return markdown
    start = posixpath.dirname(page.file.src_uri)

    def led(link: re.Match[str]) -> str:
        target = _target(origin, link[1])
        if target is None:
            return link[1]
        return posixpath.relpath(_page_of(target), start or ".")

    return _outside_fences(markdown, lambda text: LINK.sub(led, text))


def _reference() -> dict[str, str]:
    """The text of each page of the reference."""
    package = ROOT / "gpuback"
    own = re.findall(OWN_NAME, (package / "__init__.py").read_text(encoding="utf-8"))
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    placed = {name for names in API.values() for name in names}
    pages = {}
    for page, names in {**API, "more": [name for name in own if name not in placed]}.items():
        there = [name for name in names if name in own or name in modules]
        if there:
            pages[page] = f"# {page.capitalize()}\n\n" + "\n".join(f"::: gpuback.{name}\n" for name in there)
    return pages


def _origin(file: File) -> str | None:
    """Where a page's text stands in the repository; None for what is made here."""
    for place, page in ELSEWHERE.items():
        if page == file.src_uri:
            return place
    return f"docs/{file.src_uri}" if (ROOT / "docs" / file.src_uri).exists() else None


def _target(origin: str, link: str) -> str | None:
    """What a link of a document leads to, from the repository's root; None if to no file or folder of it."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if "://" not in link and (ROOT / target).exists() else None


def _page_of(target: str) -> str:
    """The page or picture for a file or folder of the repository."""
    if target in ELSEWHERE or target in FOLDERS:
        return ELSEWHERE.get(target) or FOLDERS[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else _source_page(target)


def _source_page(source: str) -> str:
    return f"source/{source}.md"


def _sources(file: File) -> set[str]:
    """The files of code that a page links to."""
    origin = _origin(file)
    if origin is None:
        return set()
    text = FENCE.sub("", (ROOT / origin).read_text(encoding="utf-8"))
    targets = {_target(origin, link) for link in LINK.findall(text)}
    return {target for target in targets if target and _page_of(target) == _source_page(target)}


def _outside_fences(text: str, change: Any) -> str:
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])
