"""Options with a type, a range and a sentence: sections of a configuration, arguments by name.

A section of the configuration is a class (`Section`), written by hand or made from the signature
and the docstring of what a registry builds (`section_of`). `checked` checks a call in the same way.
"""

import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

P = ParamSpec("P")
T = TypeVar("T")

Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=2**17)]  # of a layer
Depth = Annotated[int, Field(ge=1, le=1000)]  # in layers
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]

NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "text",
    Mapping: "a section",
}


class Section(BaseModel):
    """A part of the configuration. Values have their declared type: `no` is not false, 1 is 1.0
    where a number is declared, and there are no others than the declared ones.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    def given(self) -> dict[str, Any]:
        """The values that were given, without defaults, as keyword arguments."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def validate(section: type[Section], content: Any, prefix: str = "") -> Any:
    """A section with this content.

    Args:
        section: its class.
        content: a mapping of names to values.
        prefix: of the names in messages, such as "trainer.".

    Raises:
        ValueError: a value has a wrong type or is out of range, is missing, or is not declared; the
            message names the field, the value and what to type instead.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        # The names of what is declared, and of what is not, matter more than values.
        problems = sorted(error.errors(), key=lambda problem: "extra" not in problem["type"])
        raise ValueError(_explain(section, content, problems[0], prefix)) from None


def section_of(function: Callable[..., Any], given: Iterable[str] = (), **extra: Any) -> Any:
    """The section that holds the arguments of a function or class.

    Args:
        function: with annotations, and with a docstring that has a sentence for each argument.
        given: arguments that come from elsewhere, and have no place in the section.
        extra: further fields, as in `pydantic.create_model`.
    """
    sentences = argument_sentences(function)
    fields: dict[str, Any] = dict(extra)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = annotation, Field(default, description=sentences.get(name))
    return create_model(_name(function), __base__=Section, **fields)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of each call by their annotations, as a configuration's are checked."""
    signature = inspect.signature(function)

    @functools.cache
    def section() -> type[Section]:
        return section_of(function, given=("self",))

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        arguments = signature.bind(*args, **options).arguments
        validate(section(), {name: v for name, v in arguments.items() if name != "self"})
        return function(*args, **options)

    return call


def argument_sentences(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function or class says of each argument.

    "As in `Other`" stands for what the docstring of `Other` says, a base class or another name in
    the module of the function.
    """
    function = getattr(function, "func", function)  # of a partial
    lines = inspect.cleandoc(inspect.getdoc(function) or "").split("\n")
    sentences: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in lines:
        if not line.startswith(" "):
            inside = (inside and not line) or line in ("Args:", "Attributes:")
        elif inside and (start := re.match(r"    (\w+(?:, \w+)*): (.*)", line)):
            names = start[1].split(", ")
            sentences |= dict.fromkeys(names, start[2])
        elif inside:
            space = "" if sentences[names[0]].endswith("-") else " "
            sentences |= {name: f"{sentences[name]}{space}{line.strip()}" for name in names}
    for name, sentence in sentences.items():
        if other := re.match(r"as in `(\w+)`", sentence):
            module = inspect.getmodule(function)
            sentences[name] = argument_sentences(getattr(module, other[1])).get(name, sentence)
    return sentences


def describe_field(field: FieldInfo) -> str:
    """What may stand in a field, such as "a whole number >= 1 or null"."""
    return _describe(field.annotation, field.metadata)


def leaves(section: Section, prefix: str = "") -> Iterable[tuple[str, Any, FieldInfo]]:
    """Name, value and declaration of each value in a section and in those inside it."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field


def as_typed(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(as_typed, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _explain(section: type[Section], content: Any, problem: Any, prefix: str) -> str:
    if problem["type"] == "value_error" and not problem["loc"]:  # of a whole section: names a field
        return str(problem["ctx"]["error"])
    name, *rest = problem["loc"] or ("",)
    fields = section.model_fields
    if problem["type"] == "extra_forbidden" and not rest:
        close = difflib.get_close_matches(str(name), fields, n=1)
        suggestion = f"did you mean {prefix}{close[0]}? There are" if close else "there are"
        return f"there is no setting {prefix}{name}; {suggestion}: {', '.join(fields)}"
    if name not in fields:
        return f"{prefix.rstrip('.')}={as_typed(content)} must be {_describe(section)}"
    field = fields[name]
    expected = describe_field(field)
    if problem["type"] == "finite_number":
        expected = expected.replace("a number", "a finite number")
    sentence = f" ({field.description.rstrip('.')})" if field.description else ""
    if problem["type"] == "missing" and not rest:
        return f"{prefix}{name} is missing; it must be {expected}{sentence}"
    value = content[name]
    own_check = problem["type"] == "value_error"
    if isinstance(value, Mapping) and (rest or own_check) and _is_section(field.annotation):
        problem = problem | {"loc": rest}
        return _explain(field.annotation, value, problem, f"{prefix}{name}.")
    if own_check:
        return f"{prefix}{name}={as_typed(value)}: {problem['ctx']['error']}"
    quoted = ""
    if (
        expected.startswith("text")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ):
        quoted = f"; a number is text in quotes, '{prefix}{name}=\"{value}\"'"
    return f"{prefix}{name}={as_typed(value)} must be {expected}{sentence}{quoted}"


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return inspect.isclass(annotation) and issubclass(annotation, Section)


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        more = [m for item in arguments[1:] for m in getattr(item, "metadata", [item])]
        return _describe(arguments[0], [*metadata, *more])
    if origin in (Union, types.UnionType):
        return _join([_describe(item, metadata) for item in arguments])
    if origin is Literal:
        return _join([as_typed(item).strip("'") for item in arguments])
    if annotation is types.NoneType:
        return "null"
    if _is_section(annotation):
        return f"a section with {', '.join(annotation.model_fields)}"
    if origin in (list, Sequence):
        least, most = _limit(metadata, "min_length"), _limit(metadata, "max_length")
        count = f"{least} " if least is not None and least == most else ""
        items = _describe(arguments[0]).removeprefix("a ")
        for noun in ("number", "text"):
            items = items.replace(noun, f"{noun}s", 1)
        return f"a list of {count}{items}"
    return f"{NAMES.get(origin, 'a value')}{_range(metadata)}"


def _range(metadata: Iterable[Any]) -> str:
    least, above = _limit(metadata, "ge"), _limit(metadata, "gt")
    most, below = _limit(metadata, "le"), _limit(metadata, "lt")
    low, high = (least if above is None else above), (most if below is None else below)
    if low is not None and high is not None:
        left, right = "[" if above is None else "(", "]" if below is None else ")"
        return f" in {left}{_plain(low)}, {_plain(high)}{right}"
    if low is not None:
        return f" {'>=' if above is None else '>'} {_plain(low)}"
    return "" if high is None else f" {'<=' if below is None else '<'} {_plain(high)}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _limit(metadata: Iterable[Any], name: str) -> Any:
    return next((getattr(item, name) for item in metadata if hasattr(item, name)), None)


def _join(parts: list[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or _name(getattr(function, "func"))  # noqa: B009
