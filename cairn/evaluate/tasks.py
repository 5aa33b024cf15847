"""Tasks: files in the harness's YAML with local data, or names that the harness knows."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from yaml import YAMLError

from cairn.config.errors import close
from cairn.errors import UserError

WRONG_TASK = (TemplateError, YAMLError, AttributeError, ImportError, LookupError, TypeError, ValueError)
"""What the harness raises for a task file, or a row of its data, that says something wrong."""


def load_tasks(items: Sequence[str], num_fewshot: int | None) -> dict[str, dict[str, Any]]:
    """What the harness's `evaluate` takes. An item is a task's YAML file, a folder with such files, or a name.

    Raises UserError naming the item or file that does not exist or cannot be loaded, and a task whose own number of
    examples is 0 and must stay so.
    """
    files = {item: files_of(Path(item)) for item in items if is_path(item)}
    manager = TaskManager(include_defaults=len(files) < len(items))  # reading the harness's own takes seconds
    for item in items:
        if item not in files and item not in manager.all_tasks:
            raise UserError(
                f"--tasks {item}: no such file, and the harness knows no such task{close(item, manager.all_tasks)}"
            )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for item in items:
        found = [load_file(manager, path) for path in files[item]] if item in files else [load_name(manager, item)]
        for part in found:
            if twice := part["tasks"].keys() & loaded["tasks"].keys():
                raise UserError(f"--tasks {item}: there is a task {min(twice)} already; rename one (its key `task`)")
            for kind, named in loaded.items():
                named.update(part.get(kind, {}))
    for name, task in loaded["tasks"].items():
        given, own = num_fewshot, task.get_config("num_fewshot")
        if given and own == 0:
            raise UserError(f"--num-fewshot {given}: task {name} is defined without examples; leave the option out")
        task.set_config(key="num_fewshot", value=(own or 0) if given is None else given)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def is_path(item: str) -> bool:
    """Whether an item of --tasks means a file or folder, there or not."""
    return "/" in item or item.endswith((".yaml", ".yml")) or Path(item).exists()


def files_of(path: Path) -> list[Path]:
    """The task files that a path means: itself, or those in the folder that define a task. Raises UserError if none."""
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.glob("*.yaml")) if isinstance(read(file, functions=False).get("task"), str)]
    if not found:
        raise UserError(f"--tasks {path}: {'no task file (*.yaml) in it' if path.is_dir() else 'no such file'}")
    return found


def read(path: Path, functions: bool) -> dict[str, Any]:
    """The keys of a task file, those that it includes among them; `functions` imports the ones that it names."""
    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=functions)
    except (OSError, *WRONG_TASK) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    return config


def load_file(manager: TaskManager, path: Path) -> Any:
    """The task of a file, whose data_files are relative to it. Raises UserError naming the file."""
    config = read(path, functions=True)
    if not isinstance(config.get("task"), str):
        raise UserError(f"{path}: no key `task` with the task's name; give a task's file, and not a group's")
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        config["dataset_kwargs"] = options | {"data_files": absolute(options["data_files"], path)}
    try:
        return manager.load(config)
    except (DatasetsError, OSError, *WRONG_TASK) as error:
        raise UserError(f"{path}: {type(error).__name__}: {first_line(error)}; see docs/evaluating.md") from error


def absolute(data_files: Any, path: Path) -> Any:
    """data_files (a path or pattern, a list, or either by split) of a task file. Raises UserError if one is missing."""
    if isinstance(data_files, dict):
        return {split: absolute(part, path) for split, part in data_files.items()}
    if isinstance(data_files, list):
        return [absolute(part, path) for part in data_files]
    found = (path.parent / str(data_files)).resolve()
    if not glob.glob(str(found)):
        raise UserError(
            f"{path}: dataset_kwargs.data_files: there is no {found}; docs/evaluating.md says what it holds"
        )
    return str(found)


def load_name(manager: TaskManager, name: str) -> Any:
    """A task or group that the harness knows. Raises UserError where its data is not on this machine."""
    try:
        return manager.load(name)
    except (DatasetsError, OSError, *WRONG_TASK) as error:
        raise UserError(
            f"task {name}: {first_line(error)}; if its data is not on this machine, run once with HF_HUB_OFFLINE=0 "
            "where there is a network, or give a task file with data of your own (docs/evaluating.md)"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line: that of the error behind it, if there is one."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
