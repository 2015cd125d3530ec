"""The command line of `train.py`: what is wrong with it, and what its settings mean."""

import difflib
import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from multimax.options import as_typed, describe_field, leaves
from multimax.training.config import read_config

LENGTHS = ("epochs", "updates")
LAUNCHERS = (
    "\nlaunchers are plug-ins: for workstation type pip install '.[sweep]', for slurm pip install "
    "'.[slurm]', for ray_cluster pip install hydra-ray-launcher"
)


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The settings among the arguments of the command line, without Hydra's own flags."""
    return [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]


def complete_length(arguments: Sequence[str]) -> list[str]:
    """The arguments, so that one of `trainer.epochs` and `trainer.updates` is enough.

    Whichever is given replaces what recipes and experiments say: the other one becomes null. If
    both are given, nothing is changed.
    """
    given = {
        name: value
        for key, _, value in (argument.lstrip("+").partition("=") for argument in arguments)
        if (name := key.removeprefix("trainer.")) in LENGTHS and key != name
    }
    if len(given) != 1 or "null" in given.values():
        return list(arguments)
    (other,) = set(LENGTHS) - set(given)
    return [*arguments, f"trainer.{other}=null"]


def describe_settings(config: DictConfig) -> str:
    """Each setting of a composed configuration with its value, what it can be, and what it means.

    The text of the resolver `${settings:}`, for `--help`.
    """
    others = ("hydra", "study", "cells", "recorded", "tuning")  # of a sweep, not of a run
    content: Any = OmegaConf.masked_copy(config, [str(k) for k in config if k not in others])
    lines = []
    try:
        for name, value, field in leaves(read_config(content)):
            meaning = f"{describe_field(field)}; {field.description}"
            lines += [
                f"{name}={value if value and isinstance(value, str) else as_typed(value)}",
                *textwrap.wrap(meaning, 96, initial_indent="    ", subsequent_indent="    "),
            ]
    except ValueError as error:
        lines = [OmegaConf.to_yaml(content), f"error: {error}"]
    return "\n".join(lines).replace("$", "$$")  # of which Hydra makes one again


def explain_bad_overrides(overrides: Sequence[str], config_name: str = "config") -> str | None:
    """What is wrong with the command line and what the valid choices are; None if it composes.

    Call it inside `hydra.initialize`. Of a sweep (`a=1,2`), each choice of a group is checked, and
    the first value of a setting.
    """
    try:
        choices = [_choices(parsed) for parsed in _parse(overrides)]
    except HydraException as error:
        return str(error)
    firsts = [first for first, *_ in choices]
    others = [
        [*firsts[:i], other, *firsts[i + 1 :]]
        for i, (_, *rest) in enumerate(choices)
        for other in rest
    ]
    problems = (_explain(candidate, config_name) for candidate in (firsts, *others))
    return next((problem for problem in problems if problem), None)


def _explain(overrides: list[str], config_name: str) -> str | None:
    try:
        compose(config_name, overrides=overrides)
        return None
    except HydraException as error:
        message = str(error)
    except (ValueError, TypeError) as error:  # a group that is not chosen by a name
        return _explain_groups(overrides) or str(error)
    unknown = re.search(r"Could not override '([^']+)'", message)
    if not unknown:
        hint = LAUNCHERS if "'hydra/launcher" in message else ""
        return message.split("Config search path")[0].strip() + hint
    key = unknown.group(1)
    chosen = [p for p in _parse(overrides) if _chooses_group(p) and isinstance(p.value(), str)]
    groups = [str(p.input_line) for p in chosen]
    composed = compose(config_name, overrides=groups)
    if key in _declared(composed):
        return f"{key} is not in the configuration files: to add it, type +{key}=... with a plus"
    known = sorted(set(_keys(composed)))
    if key in known:
        return (
            f"{key} cannot be replaced as a whole: choose {key}=NAME, and type {key}.SETTING=VALUE"
        )
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    section = key.rsplit(".", 1)[0] + "." if "." in key else ""
    siblings = [k for k in known if k.startswith(section) and "." not in k[len(section) :]]
    lines = [f"there is no setting {key!r}"]
    if close:
        lines.append(f"did you mean: {', '.join(close)}")
    lines.append(f"settings there: {', '.join(siblings) or ', '.join(known)}")
    return "\n".join(lines)


def _explain_groups(overrides: list[str]) -> str | None:
    loader = GlobalHydra.instance().config_loader()
    for override in _parse(overrides):
        group, value = override.key_or_group, override.value()
        names = value if isinstance(value, list) else [value]
        if group in loader.list_groups("") and not all(isinstance(name, str) for name in names):
            options = loader.get_group_options(group) or [f"the files in configs/{group}"]
            return f"{override.input_line} must be one of: {', '.join(options)}"
    return None


def _declared(config: DictConfig) -> set[str]:
    """Names of all settings; of a configuration that is not complete, none."""
    try:
        return {name for name, _, _ in leaves(read_config(config))}
    except ValueError:
        return set()


def _parse(overrides: Sequence[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()  # globs are looked up there
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def _choices(override: Override) -> list[str]:
    """The override itself; of a sweep those of its values that are checked."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    values = override.sweep_string_iterator()
    values = values if _chooses_group(override) else islice(values, 1)
    return [f"{override.get_key_element()}={value}" for value in values]


def _chooses_group(override: Override) -> bool:
    """Whether it chooses a file of a group: these decide which settings exist."""
    groups = ("experiment", "task", "scale", "attention", "output", "data", "model", "debug")
    return override.type == OverrideType.CHANGE and override.key_or_group in groups


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        node = config._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _keys(node, f"{prefix}{key}.")
