"""Task files of a user for lm-evaluation-harness, checked before the harness sees them.

In that library's files code hides in several places, and it runs what it finds:

    !function module.name       imports Python that lies beside the file
    {{ templates }}             of Jinja, outside its sandbox, in which calls of what objects carry reach anything
    metric: name                one that it does not know is a program from the hub, or from a folder of that name
    generation_kwargs           name code that transformers' generate takes from the hub
    class, use_prompt           a class, a library of prompts
    unsafe_code                 what the model writes is run

Here such a file is refused unless the user says that it may run code. Any other is read here, as plain values, and these are handed on, so
that the harness does not open the file again. Templates may read fields, use Jinja's filters, and call the methods of texts and lists.

    dataset_path: json          with data_files, by ``datasets``: from local files alone, whose paths begin at the folder of the task file,
                                or else at the working directory; also csv, parquet, text
    any other dataset_path      is left to ``datasets``: a data set of the hub, or of its cache
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptqcli.errors import PTQError, UsageError
from ptqcli.suggest import did_you_mean
from ptqcli.temporary import temporary_folder
from ptqcli.untrusted import foreign, one_line, shown
from ptqcli.yaml_file import read_yaml

MOST_TASK_BYTES = 256 << 10
MOST_FILES = 1_000  # of a folder
MOST_INCLUDES = 16
MOST_DATA_BYTES = 1 << 30
ADVICE = "read it, and give --trust-task-code if it may run"

KEYS = (
    *("task", "task_alias", "tag", "metadata", "output_type", "num_fewshot", "repeats", "generation_kwargs", "metric_list", "filter_list"),
    *("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix", "target_delimiter", "fewshot_delimiter"),
    *("fewshot_config", "should_decontaminate", "doc_to_decontamination_query"),
)
CODE = ("process_results", "process_docs", "doc_to_image", "doc_to_audio", "use_prompt", "class", "unsafe_code")
GENERATION = (
    *("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("num_beams", "repetition_penalty"),
)
READERS = {"json": "from_json", "csv": "from_csv", "parquet": "from_parquet", "text": "from_text"}  # of datasets.Dataset

METHODS = (
    *("strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "split", "rsplit", "splitlines", "join", "replace"),
    *("index", "find", "count", "startswith", "endswith", "removeprefix", "removesuffix", "items", "keys", "values", "get"),
)
NOT_READ = {"self", "caller", "varargs", "kwargs"}  # names of objects of Jinja, from which its modules can be reached
NO_FILTERS = {"attr", "map", "select", "reject", "selectattr", "rejectattr", "groupby"}  # they take attributes by names from elsewhere


def task_configs(path: Path) -> list[dict[str, Any]]:
    """The tasks of a file, or of all files in a folder, as values to hand on. Raises PTQError, naming the file, for one that is wrong or
    would run code, UsageError for a folder without tasks."""
    files = [path] if os.path.isfile(path) else sorted(path.glob("**/*.yaml"))[: MOST_FILES + 1]
    if len(files) > MOST_FILES:
        raise PTQError(f"{path}: holds more than {MOST_FILES:,} task files; name one of them")
    configs = [config for file in files if "task" in (config := _read(file))]
    if not configs:
        raise UsageError(f"--tasks {path}: holds no task, which is a file *.yaml with a line 'task: NAME'; give another folder")
    return configs


def _read(file: Path) -> dict[str, Any]:
    """One task, or what others include."""
    config = _with_includes(file, 0)
    if "group" in config or not isinstance(config.get("task", ""), str):
        raise PTQError(f"{file}: is a group of tasks; name their files instead, or {ADVICE.partition(', and ')[2]}")
    for key in CODE:
        if config.pop(key, None):
            raise PTQError(f"{file}: '{key}' is for code; {ADVICE}")
    if unknown := sorted(set(map(str, config)) - set(KEYS)):
        raise PTQError(f"{file}: '{unknown[0]}' is no key of a task; correct it{did_you_mean(unknown[0], KEYS)}")
    generation = config.get("generation_kwargs") or {}
    if not isinstance(generation, dict) or set(generation) - set(GENERATION):
        raise PTQError(f"{file}: 'generation_kwargs' is {shown(generation)}, of which only {', '.join(GENERATION)} are taken; {ADVICE}")
    for text in _texts(config):
        if (reason := template_flaw(text)) is not None:
            raise PTQError(f"{file}: the template {shown(text)} {reason}; {ADVICE}")
    return _with_local_data(config, file)


def _with_includes(file: Path, depth: int) -> dict[str, Any]:
    """The keys of a file over those of the files that it includes."""
    if depth > MOST_INCLUDES:
        raise PTQError(f"{file}: is included more than {MOST_INCLUDES} times over; is it a circle?")
    try:
        config = read_yaml(file, MOST_TASK_BYTES)
    except PTQError as error:
        if "!function" in str(error):
            raise PTQError(f"{file}: names a function of its own with !function, which is code; {ADVICE}") from error
        raise
    if not isinstance(config, dict):
        raise PTQError(f"{file}: is no task, which has lines 'key: value'")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise PTQError(f"{file}: includes {shown(name)}, which is no file")
        merged |= _with_includes(file.parent / name, depth + 1)
    return merged | config


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def template_flaw(text: str) -> str | None:
    """What a template does that could reach code, None for one that only reads fields and calls the methods of texts."""
    if not any(mark in text for mark in ("{{", "{%", "{#")):
        return None
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2 import nodes as kinds

    environment = Environment()
    try:
        tree = environment.parse(text)
    except (TemplateSyntaxError, RecursionError) as error:
        return f"is not valid ({one_line(error)})"
    plain_loops = {id(node.node) for node in tree.find_all(kinds.Getattr)}
    for node in tree.find_all(kinds.Node):
        if isinstance(node, kinds.Call) and getattr(node.node, "attr", None) not in METHODS:
            return "calls more than methods of texts"
        if isinstance(node, (kinds.Getattr, kinds.Getitem)) and (name := _read_name(node)).startswith("_"):
            return f"reads {name}"
        if isinstance(node, kinds.Name) and (node.name in NOT_READ or node.name in environment.globals):
            return f"uses {node.name}"
        if isinstance(node, kinds.Name) and node.name == "loop" and id(node) not in plain_loops:
            return "uses loop for more than its attributes"
        if isinstance(node, kinds.Filter) and node.name in NO_FILTERS:
            return f"uses the filter {node.name}"
        if isinstance(node, (kinds.Macro, kinds.CallBlock, kinds.Include, kinds.Import, kinds.FromImport, kinds.Extends)):
            return "has more than fields, filters, conditions and loops"
    return None


def _read_name(node: Any) -> str:
    """What is read of an object by a dot or brackets, "" where only running it would tell."""
    return str(node.attr) if hasattr(node, "attr") else str(getattr(node.arg, "value", ""))


def _with_local_data(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """``config`` with what reads its local data."""
    given = config.get("dataset_kwargs") or {}
    if not isinstance(given, dict) or given.get("trust_remote_code"):
        raise PTQError(f"{file}: 'dataset_kwargs' is {shown(given)}; remote code is never run, leave it out")
    reader = READERS.get(str(config.get("dataset_path")))
    if reader is None:
        return config
    stored = given.get("data_files")
    splits = stored if isinstance(stored, dict) else {"train": stored}
    files = {str(split): _data_files(names, file) for split, names in splits.items()}
    return {**config, "dataset_kwargs": None, "custom_dataset": partial(_read_data, reader, files)}


def _data_files(names: Any, file: Path) -> list[str]:
    found = []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not name:
            raise PTQError(f"{file}: 'dataset_kwargs' needs data_files, a path or one for each split, not {shown(name)}")
        place = next(
            (each for each in (file.parent / name, Path(name)) if os.path.isfile(each)), None
        )  # False, too, for what no file can be called
        if place is None:
            raise PTQError(f"{file}: data_files names {shown(name)}, which is no file in its folder or the working directory")
        if place.stat().st_size > MOST_DATA_BYTES:
            raise PTQError(f"{place}: is larger than {MOST_DATA_BYTES >> 30} GiB, which no task needs")
        found.append(str(place.absolute()))
    return found


def _read_data(reader: str, files: Mapping[str, list[str]], **_metadata: Any) -> Any:
    """The splits, read into memory: ``datasets.load_dataset`` would count the call at its server, and keep a copy."""
    from datasets import Dataset, DatasetDict

    with temporary_folder() as cache, foreign(f"{', '.join(next(iter(files.values())))}: cannot be read"):
        return DatasetDict(
            {split: getattr(Dataset, reader)(names, cache_dir=str(cache), keep_in_memory=True) for split, names in files.items()}
        )
