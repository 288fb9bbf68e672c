"""Reads a configuration: YAML plus `key=value` overrides, sweeps, clear errors, and the fingerprints of its parts."""

import copy
import difflib
import hashlib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from upath import UPath

from vlcp_dist.errors import ConfigError
from vlcp_dist.schema import Config

# user:password@ or user@ before the host, or a parameter such as ?X-Amz-Signature=, ?sig= or &access_token=.
CREDENTIAL = re.compile(
    r"://([^/?#\s]*@|\S*[?&][^=&\s]*(token|sig|secret|password|credential|key)[^=&\s]*=)", re.IGNORECASE
)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file (a path or a URL), apply `dotted.key=value` overrides (values are YAML) and validate.

    Raises:
        ConfigError: the file is missing or is not YAML, or a key or value is not valid.
    """
    _refuse_credentials(str(path), "--config")
    try:
        text = UPath(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not {type(tree).__name__}")
    for override in overrides or []:
        _apply(tree, override)
    _refuse_credentials(tree)
    try:
        cfg = Config.model_validate(_absolute(tree))
        variants(cfg)
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error
    return cfg


def variants(cfg: Config) -> dict[str, Config]:
    """The configurations of a sweep, named as in `prototypes.beta=0.7`; without a sweep the configuration alone.

    They share the root, so what does not depend on the setting is done once.

    Raises:
        ConfigError: two values are the same, or the setting is one that a run does not have.
        ValidationError: a value is not valid.
    """
    if cfg.sweep is None:
        return {"": cfg}
    [(name, values)] = cfg.sweep.items()
    if name.partition(".")[0] in ("root", "sweep", "published", "engine"):
        raise ConfigError(f"sweep: {name} changes no result; name a setting such as prototypes.beta")
    result = {}
    for value in values:
        tree = cfg.model_dump() | {"sweep": None}
        written = json.dumps(value)
        _apply(tree, f"{name}={written}")
        result[f"{name}={written}"] = Config.model_validate(tree)
    if len(result) < len(values):
        raise ConfigError(f"sweep: {name} holds a value twice: {values}")
    return result


def fingerprint(part: Any) -> str:
    """Eight hex digits that name a part of the configuration: the same part, the same digits."""
    text = json.dumps(part, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def content(section: BaseModel | None) -> dict[str, Any] | None:
    """The fields of a section that its results depend on, as JSON-ready data."""
    if section is None:
        return None
    fields = type(section).model_fields
    keep = {name for name, field in fields.items() if _in_fingerprint(field)}
    return section.model_dump(mode="json", include=keep)


def _in_fingerprint(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("fingerprint") is False)


def _refuse_credentials(value: Any, key: str = "") -> None:
    """Refuse a URL with a password or a signature in it, without repeating it: configurations are printed and stored.

    Raises:
        ConfigError: naming the key and where credentials belong.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_credentials(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            _refuse_credentials(item, key)
    elif isinstance(value, str) and CREDENTIAL.search(value):
        raise ConfigError(
            f"{key} holds a URL with a credential in it (it is not shown here). Leave it out: storage takes "
            f"credentials from the environment (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS) or from the identity "
            f"of the machine, and Ray its token from RAY_AUTH_TOKEN_PATH"
        )


def _absolute(tree: dict[str, Any]) -> dict[str, Any]:
    """Local paths made absolute: workers run in other folders, and the same data must have the same fingerprint."""
    tree = copy.deepcopy(tree)
    evaluate = tree.get("evaluate")
    teacher = evaluate.get("teacher") if isinstance(evaluate, dict) else None
    checkpoints = teacher.get("checkpoints") if isinstance(teacher, dict) else None
    if isinstance(checkpoints, dict):
        local = {net: at for net, at in checkpoints.items() if isinstance(at, str) and "://" not in at}
        checkpoints |= {net: str(Path(folder).absolute()) for net, folder in local.items()}
    models = (("caption", "model"), ("diffusion", "model"), ("synthesize", "sentence_model"))
    for section, key in (("data", "path"), ("data", "class_names"), *models):
        values = tree.get(section)
        if not isinstance(values, dict):
            continue  # the schema will say so
        value = values.get(key)
        if isinstance(value, str) and (key == "path" or Path(value).exists()) and "://" not in value:
            values[key] = str(Path(value).absolute())
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, such as ipc=[10,50]")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} holds a value, not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def _explain(error: ValidationError, path: str | Path) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            lines.append(f"unknown key {key!r}; {hint}")
        elif key:
            lines.append(f"{key} = {item['input']!r}: {item['msg']}")
        else:
            lines.append(item["msg"].removeprefix("Value error, "))
    return f"{path}: " + "\n  ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        found = _section_type(model.model_fields[str(part)].annotation)
        if found is None:
            break
        model = found
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
