import pytest

from multimax.registry import build, look_up, option_names


def square(side, colour="red"):
    return side, colour


TABLE = {"square": square, "circle": lambda radius: radius}


def test_what_is_built():
    assert build("shape", TABLE, "square", {"side": 2}) == (2, "red")
    assert look_up("shape", TABLE, "circle")(3) == 3
    assert option_names(square) == ["side", "colour"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sqare", {}, r"^unknown shape 'sqare'; known: square, circle \(did you mean square\?\)$"),
        ("x", {}, "^unknown shape 'x'; known: square, circle$"),
        (
            "square",
            {"color": 1},
            r"^shape 'square' has no option color; it has: side, colour \(did",
        ),
        ("circle", {"b": 1, "a": 1}, "^shape 'circle' has no option a, b; it has: radius$"),
    ],
)
def test_messages(name, options, said):
    with pytest.raises(ValueError, match=said):
        build("shape", TABLE, name, options)
