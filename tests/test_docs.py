"""What the documentation says is so: its examples run, its figures are those of the JSON files, its links lead somewhere."""

import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simplex_ops

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(simplex_ops.__path__, "simplex_ops.")
    if not name.endswith("__main__") and not name.rpartition(".")[2].startswith(("_autograd", "_C"))
]


in_the_repository = pytest.mark.skipif(
    not README.exists(), reason="only the tests are here, as on a machine with a GPU"
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    known = {"torch": torch} | {public: getattr(simplex_ops, public) for public in simplex_ops.__all__}
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@in_the_repository
def test_readme_example():
    program, printed = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README.read_text(), re.S).groups()
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tests", capture_output=True, text=True)
    assert run.stdout == printed, run.stderr


@in_the_repository
def test_readme_table():
    """Each row, rounded as it is there, from the JSON that `make report` writes."""
    readme = README.read_text()
    report = json.loads((ROOT / "benchmarks/results/two_simplicial_attention-cuda.json").read_text())
    assert f"commit {report['machine']['commit']}" in readme
    measured = {}  # a shape may have been timed twice, in two of the plots
    for row in report["rows"]:
        shape = "{dtype}, {B}, {N}, {Hq} / {Hkv}, {D}, {w1} x {w2}".format(**row)
        figures = []
        for way in ("forward", "backward"):
            us, tflops, share = (row[f"{way}_{figure}"] for figure in ("us", "tflops", "of_matmul"))
            figures += [f"{us:,.0f}", f"{tflops:.0f}", f"{share:.2f}"]
        measured.setdefault(shape, []).append(" | ".join(figures))
    rows = re.findall(r"^\| ((?:bf16|fp16|fp32), [^|(]*\d) (?:\([^|]*\) )?\| (.*) \|$", readme, re.M)
    assert len(rows) > 15
    for shape, figures in rows:
        assert figures in measured[shape], shape


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
