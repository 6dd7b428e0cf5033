"""Reading manifests, and what is wrong with them: lists of sentences, empty where all is well."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import jsonschema
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


class _TemplateLoader(yaml.SafeLoader):
    """Reads CloudFormation's functions as data: ``!Ref X`` is ``{"Ref": "X"}``."""


def _function(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> dict[str, Any]:
    assert isinstance(node, yaml.ScalarNode)
    return {name: loader.construct_scalar(node)}


_TemplateLoader.add_multi_constructor("!", _function)


def template(path: Path) -> Any:
    """A CloudFormation template."""
    return yaml.load(path.read_text(), Loader=_TemplateLoader)


def constraints() -> dict[str, str]:
    """The tested versions by package."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def strict(schema: Any) -> Any:
    """The schema with every object closed that names its properties.

    Understands what Kubernetes adds to JSON schema: ``x-kubernetes-int-or-string`` and
    ``x-kubernetes-preserve-unknown-fields``.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    names_properties = isinstance(closed.get("properties"), dict)
    stays_open = closed.pop("x-kubernetes-preserve-unknown-fields", False)
    if names_properties and not stays_open:
        closed["additionalProperties"] = False
    return closed


def violations(document: Any, schema: Any) -> list[str]:
    """What a strict schema has against a document."""
    validator = jsonschema.Draft7Validator(strict(schema))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def ray_options(command: str) -> set[str]:
    """The long options of a ``ray`` command."""
    from ray.scripts.scripts import cli

    assert isinstance(cli, click.Group)
    parameters = cli.commands[command].params
    return {option for item in parameters for option in item.opts if option.startswith("--")}


def unknown_ray_options(command: str) -> list[str]:
    """The options in a shell command with ``ray`` commands that these do not have."""
    unknown = []
    for part in re.split(r"&&|\|\||;|\n", command):
        words = shlex.split(part)
        if "ray" in words:
            _, name, *rest = words[words.index("ray") :]
            given = rest[: rest.index("--")] if "--" in rest else rest
            options = {word.partition("=")[0] for word in given if word.startswith("--")}
            known = ray_options(name) | (ray_options("start") if name == "symmetric-run" else set())
            unknown += sorted(options - known)
    return unknown
