import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from multimax.options import (
    Count,
    Probability,
    Rate,
    Section,
    argument_sentences,
    as_typed,
    checked,
    describe_field,
    leaves,
    section_of,
    validate,
)


class Inner(Section):
    """A section in a section."""

    size: Count = Field(description="of it, in pixels.")
    rate: Rate | None = None
    flag: bool = True
    choice: Literal["a", "b"] = "a"
    pair: Annotated[list[Probability], Field(min_length=2, max_length=2)] | None = None
    factor: float = 1.0
    free: Any = None


class Outer(Section):
    """The whole."""

    inner: Inner
    place: str | Path | None = None
    normalizer: str | Mapping[str, Any] | None = None
    cuts: Sequence[Count] = ()


BAD = [
    ({"size": 0}, "inner.size=0 must be a whole number >= 1 (of it, in pixels)"),
    ({"size": 1.0}, "inner.size=1.0 must be a whole number >= 1 (of it, in pixels)"),
    ({"size": "1"}, "inner.size='1' must be a whole number >= 1 (of it, in pixels)"),
    ({"size": True}, "inner.size=true must be a whole number >= 1 (of it, in pixels)"),
    ({}, "inner.size is missing; it must be a whole number >= 1 (of it, in pixels)"),
    ({"size": 1, "rate": 1}, "inner.rate=1 must be a number in [0, 1) or null"),
    ({"size": 1, "flag": "no"}, "inner.flag='no' must be true or false"),
    ({"size": 1, "flag": 0}, "inner.flag=0 must be true or false"),
    ({"size": 1, "choice": "c"}, "inner.choice='c' must be a or b"),
    ({"size": 1, "pair": [1]}, "inner.pair=[1] must be a list of 2 numbers in [0, 1] or null"),
    (
        {"size": 1, "pair": [0, 2]},
        "inner.pair=[0, 2] must be a list of 2 numbers in [0, 1] or null",
    ),
    ({"size": 1, "factor": math.nan}, "inner.factor=nan must be a finite number"),
    ({"size": 1, "factor": math.inf}, "inner.factor=inf must be a finite number"),
    ({"size": 1, "siz": 2}, "there is no setting inner.siz; did you mean inner.size? There are: "),
    ({"size": 1, "xyz": 2}, "there is no setting inner.xyz; there are: size, rate"),
    (None, "inner=null must be a section with size, rate, flag"),
    ([1], "inner=[1] must be a section with size, rate, flag"),
]


@pytest.mark.parametrize(("content", "said"), BAD)
def test_a_message_names_field_value_and_remedy(content, said):
    with pytest.raises(ValueError, match=r"^") as caught:
        validate(Outer, {"inner": content})
    assert str(caught.value).startswith(said)


def test_values_get_their_declared_type():
    outer = validate(Outer, {"inner": {"size": 2, "factor": 3}, "place": Path("/a"), "cuts": [1]})
    assert isinstance(outer.inner.factor, float)
    assert outer.given() == {"inner": outer.inner, "place": Path("/a"), "cuts": [1]}
    assert dict((name, value) for name, value, _ in leaves(outer))["inner.size"] == 2
    with pytest.raises(ValueError, match="place=2014 must be text or null"):
        validate(Outer, {"inner": {"size": 1}, "place": 2014})
    with pytest.raises(ValueError, match=r"cuts=\[0\] must be a list of whole numbers >= 1"):
        validate(Outer, {"inner": {"size": 1}, "cuts": [0]})
    with pytest.raises(ValueError, match="normalizer=3 must be text, a section or null"):
        validate(Outer, {"inner": {"size": 1}, "normalizer": 3})


def base(size: Count = 1, *, name: str = "x") -> None:
    """Base.

    Args:
        size: of it.
        name: what it is
            called.
    """


def derived(size: Count, name: str, other: Rate = 0.5, **rest: Any) -> None:
    """Derived.

    Args:
        size, name: as in `base`.
        other: a half-
            life.

    Raises:
        ValueError: never.
    """


def test_arguments_are_a_section():
    assert argument_sentences(derived) == {
        "size": "of it.", "name": "what it is called.", "other": "a half-life.",
    }  # fmt: skip
    section = section_of(partial(derived, name="y"), given=("size",), extra=(int, Field(3)))
    fields = section.model_fields
    assert list(fields) == ["extra", "name", "other"]
    assert describe_field(fields["other"]) == "a number in [0, 1)"
    assert fields["other"].description == "a half-life."
    assert section().name == "y"


def test_a_checked_call():
    class Box:
        @checked
        def __init__(self, size: Count, parts: Mapping[str, Any] | None = None) -> None:
            self.size, self.parts = size, parts

    assert Box(2, {"a": object()}).size == 2
    assert Box(parts=None, size=3).size == 3
    with pytest.raises(ValueError, match="size=0 must be a whole number >= 1"):
        Box(0)
    with pytest.raises(ValueError, match="parts=3 must be a section or null"):
        Box(1, parts=3)
    with pytest.raises(TypeError, match="colour"):
        Box(1, colour="red")


def test_values_as_they_are_typed():
    assert as_typed({"a": [None, True, 1.5], "b": "x"}) == "{a: [null, true, 1.5], b: 'x'}"
