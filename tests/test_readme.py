"""The documents: what they link to is there, and the commands that they show are those of the steps."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from utils.rows import DEFENCES, one_cell, plan

PAGES = sorted(f"results/{path.name}" for path in (ROOT / "results").glob("*.md") if path.name != "tables.md")
DOCUMENTS = ("README.md", *PAGES)


def anchors(path):
    """The places of a document that a link can name: GitHub's, of its headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    document = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if not link.startswith("http")]
    lost = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert links and not lost
    assert len(links) > 10 or name not in ("README.md", "results/README.md")


def commands():
    """(folder, script, words) of every command in a block of the README; the folder is where it is to be typed."""
    for block in re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        folder = ROOT
        for line in block.replace("\\\n", " ").splitlines():
            first, *words = shlex.split(line, comments=True) or [""]
            if first == "cd":
                folder = folder / words[0]
            elif first in ("python", "torchrun"):
                place = next(place for place, word in enumerate(words) if word.endswith(".py"))
                yield folder, (folder / words[place]).relative_to(ROOT), words[place + 1 :]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_and_its_options_exist(name):
    text = re.sub(r"<!-- table (\w+) -->.*?<!-- /table \1 -->", "", (ROOT / name).read_text(), flags=re.DOTALL)
    options = {}
    for script, words in re.findall(r"`(?:python )?((?:\w+/)*\w+\.py)\s([^`]*)`", text):
        script = script if (ROOT / script).is_file() else f"ST/{script}"
        if script not in options:
            options[script] = set(load_script(script).get_parser()._option_string_actions)
        assert {word for word in words.split() if word.startswith("--")} <= options[script], (script, words)
    assert len(options) > 10 or name != "README.md"


def test_the_steps_of_the_readme_are_those_of_the_papers_row(monkeypatch):
    shown = {}
    for folder, script, words in commands():
        monkeypatch.chdir(folder)
        shown.setdefault(script, load_script(str(script)).get_parser().parse_args(words))
    steps = {}
    for defence in DEFENCES:
        steps |= plan(one_cell("cifar10", "BadNets-all2one", "paper", None, defence, None))[0]
    made = {(ROOT / step.output).resolve() for step in steps.values()}
    assert len(steps) == 11
    for step in steps.values():
        told, planned = vars(shown[Path(step.script)]), vars(step.module().get_parser().parse_args(step.words))
        monkeypatch.chdir(ROOT / Path(step.script).parent)
        for name, value in told.items():
            if value == planned.get(name) or name in ("defaults", "save_freq", "eval_freq"):
                continue
            if name == "log":
                assert value.resolve() == (ROOT / step.output).with_name("unlearn_purify.csv")
            # A path that the plan leaves to the step; None is what steps 3 and 4 need not be told.
            elif value is not None:
                assert Path(value).resolve() in made, (step.script, name)
