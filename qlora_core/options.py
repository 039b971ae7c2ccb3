"""Settings as data: fields with help and limits, validated all at once, to and from YAML and JSON. Knows no setting itself."""

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any, Self

import yaml

from qlora_core.errors import ConfigError

# A few hundred bytes of YAML can stand for a list of billions, which a message must not write out.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 300


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field with what the command line and the form say of it and the limits that validation holds it to.

    Limits: `choices`, `least`, `most`, `above` (exclusive), `optional` (None allowed), `presets` (names that stand for a
    list), `may_be_empty` (a list, also written "none"), `check` (value -> what is wrong, or None), `group` (of the form).
    """
    return field(default=default, metadata={"help": help, **limits})


class Options:
    """Base of frozen dataclasses whose fields are made by `option`. Raises ConfigError naming every wrong field at once."""

    def __post_init__(self) -> None:
        problems = [problem for spec in fields(self) if (problem := self._problem(spec))]
        if not problems:
            problems = self._combination_problems()
        if problems:
            raise ConfigError(*problems)

    def _problem(self, spec: Any) -> str | None:
        """Why the field's value cannot be used, or None; a value of another notation ("2e-4", 8.0) is converted."""
        value, limits = getattr(self, spec.name), spec.metadata
        if value is None and limits.get("optional"):
            return None
        try:
            value = _converted(value, spec.type, limits)
        except (TypeError, ValueError, OverflowError):
            return f"{spec.name} is {SHORT.repr(value)}; it must be {_described(spec.type)} ({limits['help']})"
        object.__setattr__(self, spec.name, value)
        if "choices" in limits and value not in limits["choices"]:
            return f"{spec.name} is {SHORT.repr(value)}; choose one of {', '.join(limits['choices'])}"
        if "check" in limits and (wrong := limits["check"](value)):
            return f"{spec.name}: {wrong}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _range_problem(spec.name, value, limits)
        return None

    def _combination_problems(self) -> list[str]:
        """Settings that are each possible, but not together."""
        return []

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_yaml(self) -> str:
        """Only what differs from the defaults: short to read, complete to run."""
        default = type(self)().to_json()
        changed = {name: value for name, value in self.to_json().items() if value != default[name]}
        return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)

    @classmethod
    def from_mapping(cls, values: Any, *, where: str = "the settings") -> Self:
        """Raises ConfigError that names every unknown field, with the nearest known one, and every wrong value."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: expected fields and values, found {type(values).__name__}")
        known = {spec.name for spec in fields(cls)}
        problems = []
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                problems.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
        config = None
        try:
            config = cls(**{name: value for name, value in values.items() if name in known})
        except ConfigError as error:
            problems.extend(error.problems)
        if config is None or problems:
            raise ConfigError(*(f"{where}: {problem}" for problem in problems))
        return config


def converted(kind: type[Options], name: str, value: Any) -> Any:
    """`value`, also as text, as the field of that name has it. Raises ConfigError."""
    specs = {spec.name: spec for spec in fields(kind)}  # type: ignore[arg-type]
    if name not in specs:
        near = difflib.get_close_matches(name, specs, n=1)
        raise ConfigError(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    spec = specs[name]
    if spec.type is bool and isinstance(value, str) and value.lower() in ("true", "false", "on", "off"):
        value = value.lower() in ("true", "on")
    try:
        return _converted(value, spec.type, spec.metadata)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{name} is {SHORT.repr(value)}; it must be {_described(spec.type)} ({spec.metadata['help']})"
        ) from None


def read_yaml(path: Path) -> Any:
    """Raises ConfigError where there is no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def _converted(value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """`value` as the field's type. Raises TypeError or ValueError where that would change its meaning."""
    wanted = kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
    if (wanted == "bool") != isinstance(value, bool):
        raise TypeError
    if wanted == "bool":
        return value
    if "tuple" in wanted:
        return _names(value, limits) if wanted.startswith("str") else _list_of_names(value)
    if "int" in wanted:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if "float" in wanted:
        return float(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _names(value: Any, limits: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Names in a list or between commas; one preset as it is."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    names = _list_of_names(value)
    if limits.get("may_be_empty") and names in ((), ("none",)):
        return ()
    if not names:
        raise ValueError
    return names[0] if len(names) == 1 and names[0] in limits.get("presets", ()) else names


def _list_of_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) and part for part in value):
        raise TypeError
    return tuple(value)


def _described(kind: Any) -> str:
    text = str(kind)
    for part, words in (
        ("bool", "true or false"),
        ("tuple", "a list of names"),
        ("int", "a whole number"),
        ("float", "a number"),
    ):
        if part in text:
            return words
    return "a text"


def _range_problem(name: str, value: float, limits: Any) -> str | None:
    least, above, most = limits.get("least"), limits.get("above"), limits.get("most")
    fits = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
    if fits and (most is None or value <= most):
        return None
    lower = f"at least {least}" if least is not None else f"above {above}"
    return f"{name} is {value}; it must be {lower} and at most {most} ({limits['help']})"
