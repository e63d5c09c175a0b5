"""The keys of a configuration: which there are, which are unknown, and which values differ.

A section is a pydantic model or a dataclass.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from protoseg.runtime.errors import UserError, did_you_mean

WHOLE = ("label_map", "tree")  # mappings that are one value


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top` on it; sections are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in WHOLE
        merged[key] = merge(merged[key], value) if both_sections else value
    return merged


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ between two plain configurations."""
    names: list[str] = []
    for key in sorted({*old, *new}, key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names


def sections(kind: Any) -> dict[str, Any]:
    """Names of the keys of a section, with the type of those that are sections themselves."""
    if is_dataclass(kind):
        return {field.name: None for field in fields(kind)}
    types = {name: field.annotation for name, field in kind.model_fields.items()}
    return {
        name: each if isinstance(each, type) and (is_dataclass(each) or issubclass(each, BaseModel)) else None
        for name, each in types.items()
    }


def check_keys(kind: Any, values: dict[str, Any], where: str, prefix: str = "", whole: Any = None) -> None:
    """Unknown keys, with the nearest valid one; pydantic alone would not suggest any."""
    known = sections(kind)
    for key, value in values.items():
        if key not in known:
            elsewhere = [name for name in dotted_names(whole or kind) if name.endswith(f".{key}")]
            hint = did_you_mean(str(key), known, f"valid here: {', '.join(known)}", prefix)
            hint = f"; did you mean {elsewhere[0]}?" if elsewhere else hint
            raise UserError(f"{where}: unknown key {prefix}{key}{hint}")
        if known[key] is not None:
            if not isinstance(value, dict):
                raise UserError(
                    f"{where}: {prefix}{key} is a section, got {value!r:.60}; write its keys below it"
                )
            check_keys(known[key], value, where, f"{prefix}{key}.", whole or kind)


def known_keys(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values whose keys exist."""
    known = sections(kind)
    return {
        key: known_keys(known[key], value) if known[key] is not None and isinstance(value, dict) else value
        for key, value in values.items()
        if key in known
    }


def dotted_names(kind: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, section in sections(kind).items():
        names += [f"{prefix}{key}"] if section is None else dotted_names(section, f"{prefix}{key}.")
    return names
