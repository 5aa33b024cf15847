"""The pages say what is so: files exist, commands parse, the map is whole, and the two how-to pages work."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.config.load import load
from cairn.errors import UserError
from cairn.train.folder import MAY_DIFFER
from launch.cli import VERBS, split
from launch.options import parser, read, runs

ROOT = Path(__file__).parents[1]
PAGES = {p.relative_to(ROOT).as_posix(): p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PACKAGES = ("cairn", "pretrain", "finetune", "recipes", "launch")
TOP = (*PACKAGES, "configs", "docs", "tests", "benchmarks", ".ci")
SCHEMAS = {verb.module: verb.schema for verb in VERBS.values()}


def fences(text: str) -> Iterator[tuple[str, str]]:
    """(language, body) of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield match[1], match[2]


def named(text: str) -> Iterator[tuple[str, str]]:
    """(file, body) of each fenced block whose first line is a comment with a file's name."""
    for _, body in fences(text):
        first, _, rest = body.partition("\n")
        if match := re.fullmatch(r"# ([\w./-]+\.\w+)", first):
            yield match[1], rest


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command in the `sh` blocks, without the comment after it."""
    for language, body in fences(text):
        if language == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def apply(page: str, root: Path) -> list[str]:
    """Put the named blocks of a page into a copy of the repository; the files they touched."""
    touched = []
    for name, body in named(PAGES[page].read_text("utf-8")):
        path = root / name
        lines = body.splitlines(keepends=True)
        if path.exists():
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            text = path.read_text("utf-8")
            assert text.count(old) == 1, f"{page}: {name} has changed: {old!r} is there {text.count(old)} times"
            path.write_text(text.replace(old, new), "utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body, "utf-8")
        touched.append(name)
    return touched


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    path, text = PAGES[page], PAGES[page].read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    made = {name for name, _ in named(text)}
    files = re.findall(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, TOP))})/[\w./*-]*)", text)
    files = [file.rstrip("./") for file in files if not re.search(r"/(VERB|NAME)\b", file)]  # placeholders
    assert [file for file in files if file not in made and not any(ROOT.glob(file))] == []


def started(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs and its arguments; None for a command that is not Python's."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if "-m" in words:
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    if Path(words[0]).name == "cairn":
        return (VERBS[words[1]].module if words[1] in VERBS else f"cairn {words[1]}"), words[2:]
    return None


def problem(words: list[str], made: dict[str, str]) -> str | None:
    """Why a command cannot run, as far as can be told without running it. `made`: files that the page makes."""
    found = started(words)
    if found is None:
        if Path(words[0]).name == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
            return None if set(words[1:]) <= set(targets) else "no such target"
        return None if shutil.which(words[0]) else "no such command"
    module, args = found
    if "--help" in args or module == "pytest":
        return None
    if module == "cairn launch":
        try:
            options = read(parser([]), args, VERBS)
            runs(options, VERBS[options.verb].schema)
        except UserError as error:
            return str(error)
        return None
    if module.startswith("benchmarks"):
        return None if (ROOT / f"{module.replace('.', '/')}.py").exists() else "no such benchmark"
    schema = SCHEMAS.get(module)
    if module == "cairn config":
        schema = VERBS[Path(args[0]).parent.name].schema
    elif module not in SCHEMAS:
        return "no such verb or module"
    if schema is None or args[0] in made:  # takes no config; or is run for good, below
        return None
    config, overrides = split(args)
    try:
        load(schema, ROOT / config, overrides)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    text = PAGES[page].read_text("utf-8")
    made = dict(named(text))
    new = set(re.findall(r'^\+ +"([\w-]+)": Verb\("([\w.]+)"', text, re.M))  # verbs that the page adds
    known = {f"cairn {verb}" for verb, _ in new} | {module for _, module in new}
    wrong = [
        (" ".join(words), why)
        for words in commands(text)
        if ((started(words) or ("",))[0] not in known) and (why := problem(words, made))
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_verbs_named_in_passing_exist(page: str) -> None:
    text = PAGES[page].read_text("utf-8")
    added = re.findall(r'^\+ +"([\w-]+)": Verb', text, re.M)
    verbs = re.findall(r"`cairn ([a-z][\w-]*)", text)
    assert [verb for verb in verbs if verb not in (*VERBS, "launch", "config", *added)] == []


def only_a_docstring(path: Path) -> bool:
    body = ast.parse(path.read_text("utf-8")).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_the_map_has_one_line_for_each_file() -> None:
    block = next(b for _, b in fences(PAGES["docs/architecture.md"].read_text("utf-8")) if b.startswith("launch/"))
    told, folder = [], ""
    for line in block.splitlines():
        if match := re.match(r"([\w/]+/)(\s|$)", line):
            folder = match[1]
        elif match := re.match(r"  ([\w/]+\.py) +\S", line):
            told.append(folder + match[1])
        else:
            assert not line.strip() or line.startswith("   "), line
    there = [p for top in PACKAGES for p in (ROOT / top).rglob("*.py")]
    there = [p for p in there if p.name != "__init__.py" or not only_a_docstring(p)]
    assert sorted(told) == sorted(p.relative_to(ROOT).as_posix() for p in there)


def test_functions_that_the_walk_names_exist() -> None:
    text = PAGES["docs/architecture.md"].read_text("utf-8")
    named = re.findall(r"`([\w.]+)` \(`([\w/]+\.py)`\)", text)
    assert len(named) > 10
    for name, file in named:
        inside = ast.parse((ROOT / file).read_text("utf-8")).body
        for part in name.split("."):
            found = [node for node in inside if getattr(node, "name", None) == part]
            assert found, f"{file} has no {name}"
            inside = found[0].body


def test_keys_that_may_change_on_resume_are_those_told() -> None:
    table = PAGES["docs/configuration.md"].read_text("utf-8").split("| may differ |")[1].split("\n\n")[0]
    left = [row.split("|")[1] for row in table.splitlines()[1:]]
    assert sorted(re.findall(r"`([\w.]+)`", " ".join(left))) == sorted(MAY_DIFFER)


def run(root: Path, *words: str) -> str:
    """A command in a copy of the repository, whose packages come before the installed ones."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_", "MASTER_", "SLURM_"))}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository as far as the pages touch it, with a small corpus."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "configs", "docs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(f"{n * n} is the square of {n}," for n in range(i, 90)))
    return tmp_path


def check(root: Path, files: list[str]) -> None:
    """What `make test` would say of the files: style, floors, their tests, the shipped configs, help and map."""
    python = [file for file in dict.fromkeys(files) if file.endswith(".py")]
    run(root, "ruff", "check", *python)
    run(root, "ruff", "format", "--check", *python)
    tests = [file for file in python if file.startswith("tests/")]
    tests += [f"tests/test_floors.py::test_the_house_rules[{file}]" for file in python if file not in tests]
    tests += ["tests/config/test_shipped.py", "tests/config/test_help.py"]
    tests += [f"tests/test_docs.py::{test_the_map_has_one_line_for_each_file.__name__}"]
    run(root, "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests)


@pytest.mark.slow
def test_add_a_model_from_the_page_alone(copy: Path) -> None:
    files = apply("docs/add-a-model.md", copy)
    check(copy, files)
    config = next(file for file in files if file.endswith(".yaml"))
    small = [
        "data.source=texts",
        "tokenizer.name=bytes",
        "model.d_model=32",
        "model.max_seq_len=32",
        "model.vocab_size=",
    ]
    small += [
        "train.steps=3",
        "train.log_every=1",
        "checkpoint.every=2",
        "track.progress=false",
        "train.eval_samples=8",
    ]
    said = run(copy, "launch.cli", "pretrain", config, *small)
    name = Path(config).stem
    assert "finished 3 steps" in said
    assert "valid/bits_per_byte" in said
    assert run(copy, "launch.cli", "generate", f"runs/{name}", "--prompt", "4 is", "--max-new-tokens", "5")
    said = run(copy, "launch.cli", "verify-resume", config, *small, "--steps", "6", "--resume-zero", "3")
    assert "within reduction order" in said


@pytest.mark.slow
def test_add_a_task_from_the_page_alone(copy: Path) -> None:
    files = apply("docs/add-a-task.md", copy)
    check(copy, files)
    for words in commands(PAGES["docs/add-a-task.md"].read_text("utf-8")):
        if words[:2] == ["cairn", "wine"]:
            assert "valid/accuracy: 0.9" in run(copy, "launch.cli", *words[1:], "track.progress=false")
