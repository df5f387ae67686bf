"""Read the keys and values of `--config FILE`: a .yaml, .toml or .json file without repeated keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.records import check_parsed, join_once, parse_json, read_text, suggest_repair

# Numbers of YAML 1.1 (010 is 8, 1:30 is 90), which are kept as text and read as on the command line
OLD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?)")
# Files of other trainers that do not list options: keys that such a file has → what it is
FOREIGN = {
    ("datasets",): "a list of images of kohya's scripts or musubi-tuner",
    ("directory",): "a list of images of diffusion-pipe",
    ("dataset", "model"): "a configuration of diffusion-pipe",
    ("job", "config"): "a job of ai-toolkit",
    ("training_method", "concept_file_name"): "a configuration of OneTrainer",
    ("data_backend_config",): "a configuration of SimpleTuner",
    ("--data_backend_config",): "a configuration of SimpleTuner",
}


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a .yaml, .toml or .json file; `UserError` for other files and other contents."""
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml", ".toml"):
        raise UserError(f"{path} is no .yaml, .toml or .json file. Give --config one of these.")
    text = read_text(path)
    try:
        if kind == ".json":
            data = parse_json(text, path, join=join_once)
        else:
            data = _parse_toml(text) if kind == ".toml" else _parse_yaml(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not {kind[1:].upper()} ({reason}). {suggest_repair(reason)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold settings. Write a key and its value on each line.")
    for keys, description in FOREIGN.items():
        if set(keys) <= data.keys():
            raise UserError(
                f"{path} is {description}, and its keys mean other things than options here. Give what it says as "
                "options: --help lists them, other trainers' spellings among them."
            )
    return check_parsed(data, f"{path} is not {kind[1:].upper()}")


def _parse_toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml

    # SafeLoader keeps the last of equal keys; this one refuses them.
    class Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            join_once([(str(key.value), value) for key, value in node.value])
            return node

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            is_old_number = kind is yaml.ScalarNode and implicit[0] and OLD_NUMBER.fullmatch(value)
            return self.DEFAULT_SCALAR_TAG if is_old_number else super().resolve(kind, value, implicit)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error
