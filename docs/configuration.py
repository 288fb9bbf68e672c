"""Writes configuration.md from the schema: python docs/configuration.py > docs/configuration.md"""

import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlcp_dist import config, schema

HEAD = """# Configuration

Every key of the YAML file of a run, made from the schema by `docs/configuration.py`. On the command line the same keys
are `key=value` with dots, such as `caption.batch_size=64` or `ipc=[10,50]`. An unknown key is an error that names the
nearest known one. `vlcp run --config C --print-config` shows all values of a configuration.

*Result: yes* means that another value makes another result: the stages that depend on it get new folders beside the old
ones. *no*: it changes speed, memory or how much is wanted, and everything that is done is reused.
"""


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections by their dotted keys, the whole first."""
    yield path, model
    for name, field in model.model_fields.items():
        for part in _models(field.annotation):
            yield from sections(part, f"{path}.{name}" if path else name)


def rows(model: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if _models(field.annotation):
            continue  # a section of its own
        key = f"{path}.{name}" if path else name
        cells = [f"`{key}`", _type(field), _default(field), _result(field, path), field.description or ""]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field holds; placements of stages are described once, as those of all."""
    options = [annotation, *typing.get_args(annotation)]
    found = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return [model for model in found if model is not schema.Placement]


def _type(field: FieldInfo) -> str:
    limits = [_limit(item) for item in field.metadata]
    return ", ".join([_name(field.annotation), *filter(None, limits)])


def _name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return ", ".join(filter(None, [_name(arguments[0]), *map(_limit, getattr(arguments[1], "metadata", []))]))
    if origin is list:
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_name(arguments[0])} to {_name(arguments[1])}"
    if arguments:
        return " or ".join(_name(argument) for argument in arguments)
    if annotation is type(None):
        return "null"
    return "placement" if annotation is schema.Placement else getattr(annotation, "__name__", str(annotation))


def _limit(item: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "a multiple of", "min_length": "length ≥"}
    return ", ".join(f"{sign} {getattr(item, name)}" for name, sign in signs.items() if hasattr(item, name))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**needed**"
    if field.default is None:
        return "null"
    text = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{text}`"


def _result(field: FieldInfo, path: str) -> str:
    extra = field.json_schema_extra
    knob = isinstance(extra, dict) and extra.get("fingerprint") is False
    return "no" if knob or path == "engine" or field is config.Config.model_fields["root"] else "yes"


def document() -> str:
    parts = [HEAD]
    for path, model in sections(config.Config):
        title = f"`{path}`" if path else "The run"
        table = ["| key | value | default | result | |", "| --- | --- | --- | --- | --- |", *rows(model, path)]
        text = " ".join((model.__doc__ or "").split())
        parts += [f"## {title}\n\n{text}\n", "\n".join(table) + "\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
