"""The documentation: its commands, links, paths, settings and defaults are what the code has, and the site builds.

Oracle: the programs' own parsers, the dataclasses of the settings, and the disk. A code block is checked by what it is:

    bash    (or without a language) every command goes through its program's parser; nothing is loaded
    bash    behind the mark `run`: every command really runs
    python  is executed, in a folder with an image called photo.png, and so are its tests; behind the mark
            `needs: PACKAGE` only where there is that package, else it is compiled
    behind the mark `needs: ...`: programs and flags have to exist

What is in no such block, a command of another program for one, fails.
"""

from __future__ import annotations

import argparse
import configparser
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from qwenla_jax import __version__
from qwenla_jax.cli import command_line
from qwenla_jax.cli.main import COMMANDS
from qwenla_jax.config.checks import relations
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import build, leaves
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.evals.generate_options import GenerateOptions
from qwenla_jax.serve.serve_options import ServeOptions

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LANGUAGES = {"", "bash", "python", "json", "text"}
FENCE = re.compile(r"\s*```(\w*)")
MARK = re.compile(r"<!-- (run|test-command|needs: \S.*) -->")
TOP = {"docs", "launch", "convert", "configs", "tests", "qwenla_jax", ".ci", ".github"}
ROOMS = {path.name for path in (ROOT / "qwenla_jax").iterdir() if path.is_dir()}
PATH = re.compile(r"(?<![\w./:-])((?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|sh|yml|ipynb|svg|png|sbatch)(?!\w))?)")
SETTINGS = {
    leaf.key: leaf.field.default if leaf.field.default is not dataclasses.MISSING else leaf.field.default_factory()
    for cls in (DistillOptions, RunOptions)
    for leaf in leaves(cls)
}
GROUPS = {key.rpartition(".")[0] for key in SETTINGS} - {""}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its place, the fence's language, its text, and the mark before it."""

    where: str
    language: str
    text: str
    mark: str


def blocks_of(name: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    before, inside, begin = "", None, 0
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            mark = MARK.fullmatch(before.strip())
            inside, begin, language = [], number, fence[1]
        elif fence:
            yield Block(f"{name}:{begin}", language, "\n".join(inside), mark[1] if mark else "")
            inside, before = None, ""
        elif inside is not None:
            inside.append(line)
        if inside is None and line.strip():
            before = line
    assert inside is None, f"{name}: a fence is not closed"


def outside_of(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^\s*```.*?^\s*```$", "", text)


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a bash block as words, without comments, assignments and the folder of an environment."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                if words:
                    yield words
                words = []
            else:
                words.append(word.removeprefix(".venv/bin/"))


BLOCKS = [block for page in PAGES for block in blocks_of(page.relative_to(ROOT).as_posix(), page.read_text())]


class Parsed(BaseException):
    """A program has parsed its flags; what comes next would load something."""


def parse(program: Any, argv: list[str]) -> None:
    """Has a program parse its flags, and checks the settings among them.

    Raises:
      AssertionError: the program refuses them; with its message.
    """
    parse_flags, parse_args = command_line.parse_flags, argparse.ArgumentParser.parse_args

    def flags(words: Any, cls: type, values: Any) -> None:
        rest = parse_flags(words, cls, values)
        assert len(rest) == 1, f"unexpected arguments: {rest[1:]}"
        if "config" in values and values.config is not None:
            options = build(cls, values.config.to_dict())
            problems = list(relations(options)) if cls is RunOptions else []
            assert not problems, problems
        raise Parsed

    def arguments(self: Any, words: Any = None, namespace: Any = None) -> None:
        parse_args(self, words, namespace)
        raise Parsed

    with (
        mock.patch.object(command_line, "parse_flags", flags),
        mock.patch.object(argparse.ArgumentParser, "parse_args", arguments),
        mock.patch.object(sys, "argv", ["qwenla", *argv]),  # where config_flags looks for settings
    ):
        try:
            program.main(argv)
        except Parsed:
            return
        except SystemExit as ended:
            assert ended.code in (0, None) and "--help" in argv, f"refused: {ended.code}"


def module_at(path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def qwenla(argv: list[str]) -> tuple[Any, list[str]]:
    """The program of a `qwenla` command, and its arguments."""
    if argv == ["--help"]:
        return importlib.import_module("qwenla_jax.cli.main"), argv
    assert argv and argv[0] in COMMANDS, f"there is no command {argv[:1]}"
    if argv[0] == "convert":
        assert argv[1:2] in (["from_hf"], ["to_hf"]), f"convert {argv[1:2]}"
        argv = argv[1:]
    return importlib.import_module(f"qwenla_jax.cli.{argv[0]}"), argv[1:]


def check(words: list[str]) -> None:
    """A command that is this project's has to be one that its parser takes; another one needs a mark."""
    if words[:3] == ["python", "-m", "qwenla_jax"]:
        words = ["qwenla", *words[3:]]
    if words[0] == "qwenla":
        parse(*qwenla(words[1:]))
    elif words[0] == "python" and words[1] == "docs/figures/look_again.py":
        assert (ROOT / words[1]).is_file() and len(words) == 2
    elif words[0] == "python" and words[1].split("/")[0] in ("launch", "convert"):
        parse(module_at(ROOT / words[1]), words[2:])
    else:
        raise AssertionError(f"{words[0]}: no program of this project; the block needs a mark")


def known_flags() -> set[str]:
    """Names that programs of this checkout define as flags, and flags that their help tells of."""
    names = {leaf.key for cls in (GenerateOptions, ServeOptions) for leaf in leaves(cls)}
    for folder in ("qwenla_jax/cli", "launch", "convert", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py" and path != Path(__file__):
                text = path.read_text()
                names |= set(re.findall(r"(?:DEFINE_\w+|add_argument|add)\(\s*\"(?:--)?(\w+)\"", text))
                for loop in re.findall(r"for name in \(([^)]*)\):\s+\w+\.add_argument\(f\"--\{name\}", text):
                    names |= set(re.findall(r"\w+", loop))
            elif path.suffix == ".sh":
                names |= set(re.findall(r"--(\w+)", path.read_text()))
    return names | {"help"}


def check_flags(text: str, known: set[str]) -> None:
    """Flags of this project, which have no hyphens, and settings of commands have to exist."""
    for flag in re.findall(r"(?<![\w-])--([A-Za-z_][\w.-]*)", text):
        if flag.startswith("config."):
            assert flag.removeprefix("config.").rstrip(".") in SETTINGS.keys() | GROUPS | {"KEY"}, f"--{flag}"
        elif "-" not in flag:
            assert flag in known, f"--{flag} is no flag of any program"


EXTERNAL = {"location", "strict"}  # of gcloud and mkdocs


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_block(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    if block.mark == "test-command":
        return  # .ci/run runs it
    assert block.language in LANGUAGES, f"{block.where}: {block.language}"
    if block.language == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    if block.language not in ("", "bash"):
        return  # test_python
    commands = list(commands_of(block.text))
    assert commands
    for words in commands:
        if block.mark == "run":
            assert words[0] == "qwenla"
            result = subprocess.run([sys.executable, "-m", "qwenla_jax", *words[1:]], capture_output=True, text=True)
            assert result.returncode == 0 and result.stdout.strip(), result.stderr
        elif block.mark:
            check_flags(" ".join(words), known_flags() | EXTERNAL)
            check_extras(words)
            program = words[1] if words[0] == "python" else words[0]
            if "/" in program:
                assert (ROOT / program).is_file(), program
        else:
            check(words)


def check_extras(words: list[str]) -> None:
    """Extras of the package have to exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words:
        for extras in re.findall(r"^\.\[(.+)\]$", word):
            for extra in extras.split(","):
                assert extra in setup["options.extras_require"], extra


def test_python(tmp_path, monkeypatch):
    """Every block of Python runs, equal ones once, and so do its tests; one beginning with `# NAME.py` is that file."""
    shutil.copy(DOCS / "figures" / "scene.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    texts = {block.text: block for block in BLOCKS if block.language == "python"}
    assert len(texts) >= 4
    monkeypatch.syspath_prepend(tmp_path)
    for text, block in texts.items():
        package = block.mark.removeprefix("needs: ")
        names: dict[str, Any] = {"__name__": "documented"}
        if file := re.match(r"# (\w+)\.py\n", text):
            Path(f"{file[1]}.py").write_text(text)
            sys.modules.pop(file[1], None)
        program = compile(text, block.where, "exec")
        if package and importlib.util.find_spec(package) is None:
            continue
        exec(program, names)
        for name in names:
            if name.startswith("test_"):
                names[name]()


def test_figure(monkeypatch):
    """The figure shows what its command answers."""
    monkeypatch.chdir(ROOT)
    figure = module_at(DOCS / "figures" / "look_again.py")
    from qwenla_jax import ask, load

    answer = ask(load("tiny"), DOCS / "figures" / "scene.png", figure.QUESTION, **figure.SETTINGS)
    texts = lambda drawn: re.findall(r"<text[^>]*>([^<]*)</text>", drawn)  # noqa: E731
    drawn = texts((DOCS / "figures" / "look_again.svg").read_text())
    assert answer.reattention and "&lt;REFLECTION&gt;" in "".join(drawn)
    # What is measured of attention may differ in its last digit on another machine.
    assert [line for line in texts(figure.draw(answer)) if "%" not in line] == [x for x in drawn if "%" not in x]
    command = next(words for block in BLOCKS for words in commands_of(block.text) if "--temperature=1" in words)
    flags = dict(word.removeprefix("--").split("=", 1) for word in command[2:])
    assert flags.pop("question") == figure.QUESTION and flags.pop("image") == "docs/figures/scene.png"
    assert flags.pop("model") == "tiny"
    assert flags.keys() == figure.SETTINGS.keys()
    assert all(type(value)(flags[name]) == value for name, value in figure.SETTINGS.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names(page):
    """Flags, settings and commands that the prose names, in code spans."""
    known, text = known_flags() | EXTERNAL, outside_of(page.read_text())
    for span in re.findall(r"`([^`\n]+)`", text):
        check_flags(span, known)
        words = span.split()
        if words[0] == "qwenla" and len(words) > 1:
            assert words[1] in COMMANDS or words[1].startswith("-"), span
        key = span.removeprefix("--").partition("=")[0].removeprefix("config.")
        if re.fullmatch(r"(--)?config\.[a-z_.*]+(=.*)?", span) and key != "json":
            assert key.rstrip(".*") in SETTINGS.keys() | GROUPS, span
        elif key.partition(".")[0] in GROUPS and re.fullmatch(r"[a-z]+\.[a-z_]+(=.*)?", span):
            assert key in SETTINGS or (ROOT / "qwenla_jax" / span).is_file(), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page):
    """Files and folders of this checkout exist, and those of the package where their path begins with a room."""
    for path in PATH.findall(page.read_text()):
        first = path.split("/")[0]
        if first in TOP:
            assert (ROOT / path).exists(), path
        elif first in ROOMS and "." in path:
            assert (ROOT / "qwenla_jax" / path).exists() or (page.parent / path).exists(), path


def defaults_of(text: str) -> Iterator[tuple[str, str]]:
    """(setting, default) of every table whose columns begin with `setting` and `default`."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[:2] == ["setting", "default"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and not cells[0].startswith("---"):
            keys = re.findall(r"`config\.([\w.]+)`", cells[0])
            values = cells[1].split(", ")
            assert keys and len(values) in (1, len(keys)), line
            yield from zip(keys, values * (len(keys) // len(values)), strict=True)


def equal(shown: str, default: Any, key: str) -> bool:
    """Whether a table shows a default."""
    shown = shown.strip("`")
    if default is None or default == ():
        return shown == "none"
    if isinstance(default, bool | str):
        return shown == str(default)
    return float(shown) == float(default)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_defaults(page):
    of_distill = {leaf.key: leaf.field.default for leaf in leaves(DistillOptions)}
    settings = SETTINGS | (of_distill if page.name == "distillation.md" else {})
    for key, shown in defaults_of(page.read_text()):
        assert equal(shown, settings[key], key), f"config.{key}: {shown}, but the default is {settings[key]!r}"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", outside_of(target.read_text()))
            assert anchor in map(slug, headings), f"{page.name}: {link}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["cff-version"] == "1.2.0"
    assert cited["references"][0]["identifiers"][0]["value"] == "arXiv:2505.23558"


def test_site(tmp_path):
    """It builds without a warning, holds every page, and its pages load nothing from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "site" / "mkdocs.yml")]
    result = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in DOCS.glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        text = (tmp_path / name).read_text()
        loaded = re.findall(r"<(?:script|img)[^>]*\ssrc=\"?([^\" >]+)|<link[^>]*rel=\"?stylesheet[^>]*", text)
        assert loaded and not [url for url in loaded if url.startswith(("http", "//"))], name
        assert not re.findall(r"<link[^>]*rel=\"?stylesheet[^>]*href=\"?(?:https?:)?//", text), name


BROKEN = {
    "wrong flag": "```bash\nqwenla generate --model=tiny --image=a --question=b --looks=2\n```",
    "wrong setting": "```bash\nqwenla train --config=brpo --config.rewards.formt=1\n```",
    "wrong value": "```bash\nqwenla train --config=brpo --config.rewards.match=usual\n```",
    "wrong recipe": "```bash\nqwenla train --config=brp\n```",
    "wrong preset": "```bash\nqwenla train --config=brpo:8b\n```",
    "wrong command": "```bash\nqwenla tarin --config=brpo\n```",
    "argument that is no flag": "```bash\nqwenla train --config=brpo runs\n```",
    "wrong door": "```bash\npython launch/trian.py --config=configs/brpo.py\n```",
    "no mark": "```bash\npip install .\n```",
    "no language": "```\nqwenla tarin\n```",
    "unknown language": "```sh\nqwenla --help\n```",
    "wrong extra": "<!-- needs: network -->\n```bash\npip install '.[gpu]'\n```",
    "wrong flag behind a mark": "<!-- needs: SLURM -->\n```bash\nlaunch/cluster/slurm.sh --machines=2\n```",
    "wrong launcher behind a mark": "<!-- needs: SLURM -->\n```bash\nlaunch/slurm.sh --nodes=2\n```",
    "run that fails": "<!-- run -->\n```bash\nqwenla fit --config=brpo:7b --topology=v9:2 --arithmetic\n```",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_checker_reports(text, monkeypatch):
    (block,) = blocks_of("page", text)
    with pytest.raises((AssertionError, FileNotFoundError)):
        test_block(block, monkeypatch)


def test_the_table_for_people_who_come_from_other_trainers(monkeypatch):
    """At least 25 rows, their commands parse, and at least 20 are run by tests that exist."""
    monkeypatch.chdir(ROOT)
    rows = [line.split(" | ") for line in (DOCS / "from-trl.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25 and all(len(row) == 3 for row in rows)
    run = 0
    for _, here, shown in rows:
        for command in re.findall(r"`(qwenla [^`]+)`", here):
            check(shlex.split(command))
        run += "`tests/" in shown
        for path, name in re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", shown):
            assert (ROOT / path).exists() and (not name or f"\ndef {name}(" in (ROOT / path).read_text()), shown
    assert run >= 20
