"""Build the site's pages: the repository's own Markdown, the API's reference, and the code that pages link to.

The documents stay where a reader of the repository looks for them, and link to each other and to the code as files do.
Here each becomes a page, and so does every file of code that one of them links to. A new document in docs/ needs no
entry anywhere: it becomes a how-to page. MathJax is copied from a package, so that formulas need no internet.
"""

from __future__ import annotations

import posixpath
import re
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

OUTSIDE = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "tests/README.md": "tests.md",
    "tests/emulator/README.md": "emulator.md",
    "benchmarks/README.md": "benchmarks/running.md",
    "benchmarks/results/cpu.md": "benchmarks/cpu.md",
    "benchmarks/results/h200.md": "benchmarks/h200.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Documents outside docs/, and their pages on the site."""

FOLDERS = {"benchmarks/results": "benchmarks/cpu.md", "docs/examples": "examples/README.md"}
"""Pages for links to folders."""

EXPLAINED = ["backprop.md", "numerics.md", "reproducible.md", "reliability.md", "kernels.md", "emulator.md"]
"""Pages that say how and why. All others of docs/ say how to, or are in SECTIONS."""

SECTIONS = {
    "Benchmarks": ["benchmarks.md", "benchmarks/running.md", "benchmarks/cpu.md", "benchmarks/h200.md"],
    "Project": ["changelog.md", "contributing.md", "tests.md"],
}

IN_NAVIGATION = {"benchmarks.md": "Results", "benchmarks/running.md": "Running benchmarks"}
"""Pages that the navigation does not call by their heading."""

API: dict[str, dict[str, list[str]]] = {
    "networks": {
        "": ["MLP", "Gradients", "Pullback", "check_gradients", "GradientReport", "backends", "BackendStatus"],
        "losses": [
            *("CrossEntropy", "BinaryCrossEntropy", "SquaredError", "AbsoluteError", "Huber", "Quantile", "Poisson"),
            "Loss",
        ],
    },
    "training": {
        "": ["fit", "TrainStep", "History", "LossScaling", "SGD", "Adam", "AdamW"],
        "schedules": ["constant", "step_decay", "cosine", "warmup", "Schedule"],
    },
    "activations": {"": ["register_activation", "CudaForms"]},
    "arrays": {"": ["fused_backward", "bind_fused_backward"]},
    "others": {
        "sklearn": ["MLPClassifier", "MLPRegressor", "from_sklearn"],
        "torch": ["FusedMLP", "from_torch", "to_torch"],
        "onnx": ["to_onnx"],
        "tensorboard": ["logger"],
    },
    "testing": {
        "testing": ["tolerance", "fingerprint", "random_array", "random_layer", "LayerCase", "random_batch"],
    },
    "data": {"datasets": ["load", "Dataset", "Schema", "read_idx", "write_idx"]},
    "errors": {"errors": []},
}
"""Pages of the reference: on each, public modules of gpuback ("" is gpuback itself) and their names to show.

An empty list stands for all classes. Names are found through the module that users import, wherever they are defined.
"""

ELSEWHERE = {"losses", "schedules", "DivergedError", "GpubackError"}
"""Names of gpuback itself that their own module's entry shows."""

TITLES = {"others": "Other libraries", "arrays": "Your own arrays", "activations": "Your own activations"}

MATHJAX = (
    "LICENSE",
    "MathJax.js",
    "config/TeX-AMS-MML_HTMLorMML-full.js",
    "jax/element",
    "jax/output/HTML-CSS",
    "fonts",
)
"""What docs/site/mathjax.js needs, files and folders below the package's `static`."""

FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*$", re.MULTILINE | re.DOTALL)
SOURCES, PICTURE = "source/", ".png"
"""Where pages of code and pictures outside docs/ go, and how pictures' names end."""

LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
OWN_NAME = re.compile(r"^from gpuback\S* import \w+ as (\w+)$", re.MULTILINE)
CLASS = re.compile(r"^class ([A-Z]\w+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the navigation."""
    placed = {page for pages in SECTIONS.values() for page in pages}
    here = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    outside = set(_outside().values())
    sections = {
        name: [{IN_NAVIGATION.get(page): page} for page in pages if page in outside or page in here]
        for name, pages in SECTIONS.items()
    }
    config.nav = [
        {"Getting started": "index.md"},
        {"How to": ["examples/README.md", *(page for page in here if page not in (*EXPLAINED, *placed))]},
        {"How and why": EXPLAINED},
        {"Benchmarks": sections["Benchmarks"]},
        {"Reference": [f"api/{name}.md" for name in API]},
        {"Project": sections["Project"]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and MathJax."""
    for place, page in _outside().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    for name, text in _reference().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    for source in sorted({target for file in files.documentation_pages() for target in _sources(file)}):
        if source.endswith(PICTURE):
            files.append(File.generated(config, _page_of(source), abs_src_path=str(ROOT / source)))
            continue
        code = (ROOT / source).read_text(encoding="utf-8")
        language = "python" if source.endswith(".py") else "cpp"
        text = f"# {source}\n\n~~~~~{language}\n{code}~~~~~\n"
        files.append(File.generated(config, _page_of(source), content=text))
    for name, path in _mathjax():
        files.append(File.generated(config, f"mathjax/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead a page's links to files of the repository to the files' pages."""
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


def _outside() -> dict[str, str]:
    return {place: page for place, page in OUTSIDE.items() if (ROOT / place).exists()}


def _mathjax() -> list[tuple[str, Path]]:
    """List MathJax's files: names below MathJax's root, and where they are.

    Raises:
        PluginError: the package is not installed.
    """
    try:
        static = Path(str(resources("jupyter_server_mathjax"))) / "static"
    except ModuleNotFoundError as error:
        raise PluginError("formulas need jupyter-server-mathjax: pip install '.[site]' in the source tree") from error
    starts = [static / name for name in MATHJAX]
    found = [path for start in starts for path in (start, *sorted(start.rglob("*"))) if path.is_file()]
    return [(path.relative_to(static).as_posix(), path) for path in found]


def _reference() -> dict[str, str]:
    """Write the text of each page of the reference.

    Raises:
        PluginError: a public name of gpuback is on no page, or a name in API does not exist.
    """
    own = set(re.findall(OWN_NAME, _module_text("")))
    missing = own - ELSEWHERE - {name for modules in API.values() for name in modules.get("", [])}
    if missing:
        raise PluginError(f"on no page of the reference (API in docs/site/hooks.py): {', '.join(sorted(missing))}")
    pages = {}
    for page, modules in API.items():
        blocks = [f"# {TITLES.get(page, page.capitalize())}\n"]
        for module, names in modules.items():
            text = _module_text(module)
            unknown = [name for name in names if not re.search(rf"\b{name}\b", text)]
            if unknown:
                raise PluginError(f"API in docs/site/hooks.py: gpuback.{module} has no {', '.join(unknown)}")
            if module == "":
                blocks += [f"::: gpuback.{name}\n" for name in names]
            else:
                shown = ", ".join(names or re.findall(CLASS, text))
                blocks.append(f"::: gpuback.{module}\n    options:\n      members: [{shown}]\n")
        pages[page] = "\n".join(blocks)
    return pages


def _module_text(module: str) -> str:
    """Read the source of a public module, a file or a package; "" is gpuback itself."""
    place = ROOT / "gpuback" / module
    return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text(encoding="utf-8")


def _origin(file: File) -> str | None:
    """Find where a page's text stands in the repository; None if it is made here."""
    for place, page in OUTSIDE.items():
        if page == file.src_uri:
            return place
    return f"docs/{file.src_uri}" if (ROOT / "docs" / file.src_uri).exists() else None


def _target(origin: str, link: str) -> str | None:
    """Resolve a document's link to a path from the repository's root; None if no file or folder is there."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if "://" not in link and (ROOT / target).exists() else None


def _page_of(target: str) -> str:
    """Find the page or picture for a file or folder of the repository."""
    if target in OUTSIDE or target in FOLDERS:
        return OUTSIDE.get(target) or FOLDERS[target]
    if target.startswith("docs/") and not target.endswith(".py"):
        return target.removeprefix("docs/")
    return f"{SOURCES}{target}" if target.endswith(PICTURE) else f"{SOURCES}{target}.md"


def _sources(file: File) -> set[str]:
    """Collect the files of code that a page links to, and the pictures outside docs/ that it shows."""
    origin = _origin(file)
    if origin is None:
        return set()
    text = FENCE.sub("", (ROOT / origin).read_text(encoding="utf-8"))
    targets = {_target(origin, link) for link in LINK.findall(text)}
    return {target for target in targets if target and _page_of(target).startswith(SOURCES)}


def _outside_fences(text: str, change: Any) -> str:
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])
