"""What the documents say: commands can be typed, links lead somewhere, and files that are named are there."""

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from typer.main import get_command

from cli.main import app
from dalle import config
from dalle.builtin import FOLDER
from dalle.errors import ConfigError
from dalle.evaluate import TITLES
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage2_prior.config import PRESETS as PRIOR_PRESETS

ROOT = Path(__file__).parents[2]
README = Path("README.md")
DOCUMENTS = sorted(p.relative_to(ROOT) for pattern in ("*.md", "docs/*.md") for p in ROOT.glob(pattern))
MANUALS = [path for path in DOCUMENTS if path == README or path.parent.name == "docs"]
BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`(?!`)((?:[^`\n]|\n(?!\s*\n))+)`")  # code in a sentence, over several lines perhaps
LINE = re.compile(r"^(?:.*\\\n)*.*$", re.MULTILINE)  # of a shell
COMMAND = re.compile(r"(?:^|\s)(?:dalle|cli\.main)\s+(.*)", re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: *(\S+)", re.MULTILINE)
FOLDERS = "dalle|stage1_dvae|stage2_prior|cli|benchmarks|tests|unit|property|parity|e2e|distributed"
FILE = re.compile(rf"((?:{FOLDERS})/[\w./-]*\w)(?:::(\w+))?")
TRAINED = {"train-dvae": DVAE_PRESETS, "train-prior": PRIOR_PRESETS, "plan": PRIOR_PRESETS}


def read(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def without(pattern: re.Pattern, text: str) -> str:
    """Spaces in place of what matches; everything else stays where it is."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def commands(text: str) -> Iterator[tuple[int, str, bool]]:
    """The line and the arguments of each `dalle`, and whether they are all: sentences leave some out."""
    for block in BLOCK.finditer(text):
        for line in LINE.finditer(block[0]):
            if found := COMMAND.search(line[0].replace("\\\n", " ")):
                yield line_of(text, block.start() + line.start()), found[1], True
    for span in SPAN.finditer(without(BLOCK, text)):
        if found := COMMAND.match(span[1]):
            # The name of what is to be put there, N or IMAGE…, could be any number or word.
            said = re.sub(r"\b[A-Z]+\b…?", "1", re.sub(r"[\[\]]|(?<!\S)…", "", found[1]))
            if not found[1].startswith("COMMAND"):
                yield line_of(text, span.start()), said, False


def check_settings(command: str, preset: str | None = None, settings: Any = None, **_: object) -> None:
    """In place of a command: its preset and what it sets exist, in some preset where none is named."""
    presets, errors = TRAINED.get(command, {}), []
    for name in presets if preset is None else [preset]:
        try:
            model, training = config.preset(presets, name)
            config.override({"model": model, "training": training}, settings or ())
            return
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise errors[0]


COMMANDS = get_command(app)
for called, command in COMMANDS.commands.items():
    command.callback = partial(check_settings, called)


def complaint(arguments: str, whole: bool) -> str:
    """What the command line says to these arguments; nothing where it would begin."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            COMMANDS.main(shlex.split(arguments, comments=True), prog_name="dalle", standalone_mode=False)
        except Exception as error:
            if whole or type(error).__name__ != "MissingParameter":
                return getattr(error, "format_message", error.__str__)()
    return ""


def wrong_commands(text: str) -> list[tuple[int, str]]:
    return [(line, said) for line, given, whole in commands(text) if (said := complaint(given, whole))]


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    seen: Counter[str] = Counter()
    found = set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", without(BLOCK, text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def wrong_links(document: Path, text: str) -> list[tuple[int, str]]:
    wrong = []
    for link in LINK.finditer(without(SPAN, without(BLOCK, text))):
        target = link[1] or link[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / document.parent / unquote(name) if name else ROOT / document
        if not path.exists():
            wrong.append((line_of(text, link.start()), f"{name} does not exist"))
        elif anchor and anchor not in anchors(text if not name else path.read_text(encoding="utf-8")):
            wrong.append((line_of(text, link.start()), f"{name or document} has no heading for #{anchor}"))
    return wrong


def wrong_files(text: str) -> list[tuple[int, str]]:
    """The project's files and tests that are named in code and are not there; tests/ may be left out."""
    wrong = []
    for span in SPAN.finditer(without(BLOCK, text)):
        if not (found := FILE.fullmatch(span[1])):
            continue
        name, test = found.groups()
        path = next((path for path in (ROOT / name, ROOT / "tests" / name) if path.exists()), None)
        if path is None:
            wrong.append((line_of(text, span.start()), f"{name} does not exist"))
        elif test and not re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            wrong.append((line_of(text, span.start()), f"{name} has no {test}"))
    return wrong


def refuse(document: Path, wrong: list[tuple[int, str]]) -> None:
    assert not wrong, "\n" + "\n".join(f"{document}:{line}: {said}" for line, said in wrong)


@pytest.mark.parametrize("document", MANUALS, ids=str)
def test_every_command_of_the_manuals_can_be_typed(document):
    refuse(document, wrong_commands(read(document)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_somewhere(document):
    refuse(document, wrong_links(document, read(document)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_file_that_is_named_is_there(document):
    refuse(document, wrong_files(read(document)))


def test_what_the_readme_says_of_the_built_in_model_is_its_report():
    text, splits = read(README), json.loads((FOLDER / "report.json").read_text())["splits"]
    begin = text.index("## The built-in model\n")
    rows = re.compile(r"^\| (.+?) \| ([\d.]+) ?% \|$", re.MULTILINE).finditer(text, begin)
    said = {row[1]: (line_of(text, row.start()), row[2]) for row in rows}
    assert said.keys() == set(TITLES.values()), f"{README}:{line_of(text, begin)}: it has {sorted(said)}"
    wrong = []
    for name, split in splits.items():
        line, percent = said[TITLES[name]]
        counted = f"{100 * split['right'] / split['prompts']:.{len(percent.partition('.')[2])}f}"
        if percent != counted:
            wrong.append((line, f"{TITLES[name]}: {percent}%, report.json has {counted}%"))
    refuse(README, wrong)


MANUAL = """# A manual

```
$ dalle train-dvae --preset tiny --steps 3   # as it should be
srun dalle train-prior --run r \\
    --machine 2
python -m -- cli.main sample
```

`dalle sample PROMPT -n N`, `dalle export`, and `dalle COMMAND --help` are right; `dalle samples`, `dalle
info --jsn`, `dalle train-prior --set width=x` and `dalle plan [--preset papers]` are not.
`unit/test_documents.py::test_every_link_leads_somewhere` and `dalle/engine.py` are there,
`tests/unit/test_documents.py::test_none`, `unit/test_none.py` and `dalle/none.py` are not.

## Some `code`, and (more)
[one](#some-code-and-more), [two](docs/paper.md#the-paper-and-this-code), [three](https://example.org/none);
[four](#none), [five](docs/none.md), [six](docs/paper.md#none) and `[seven](none)`.
"""


def test_mistakes_are_found_in_their_lines():
    assert [line for line, _ in wrong_commands(MANUAL)] == [5, 7, 10, 10, 11, 11]
    assert "--machine" in wrong_commands(MANUAL)[0][1]
    assert [line for line, _ in wrong_files(MANUAL)] == [13, 13, 13]
    assert wrong_links(README, MANUAL) == [
        (17, "README.md has no heading for #none"),
        (17, "docs/none.md does not exist"),
        (17, "docs/paper.md has no heading for #none"),
    ]
    with pytest.raises(AssertionError, match=r"README\.md:17: docs/none\.md does not exist"):
        refuse(README, wrong_links(README, MANUAL))
