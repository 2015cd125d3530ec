"""The registry: names, options, and the error for each option that is out of range."""

import math
import re

import pytest

from multimax import NORMALIZERS, Normalizer, build_normalizer, registered_normalizers


@pytest.mark.parametrize("name", registered_normalizers())
def test_builds_each(name):
    module = build_normalizer(name)
    assert type(module) is NORMALIZERS[name]
    assert isinstance(module, Normalizer)


def test_passes_options_on():
    assert build_normalizer("topk", k=7).k == 7
    assert build_normalizer("entmax", alpha=1.7).alpha == 1.7
    assert build_normalizer("multimax", order=1, init="identity").order == 1


def test_an_unknown_name_lists_the_known():
    known = ", ".join(registered_normalizers())
    with pytest.raises(ValueError, match=re.escape(f"unknown normalizer 'sofmax'; known: {known}")):
        build_normalizer("sofmax")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("topk", "k, floor, length_scale, reference_length, heads"),
        ("sparsemax", "length_scale, reference_length, heads"),
    ],
)
def test_an_unknown_option_lists_the_options(name, known):
    with pytest.raises(ValueError, match=f"{name!r} has no option temp; it has: {known}$"):
        build_normalizer(name, temp=1.0)


@pytest.mark.parametrize(
    ("name", "option", "value", "others"),
    [
        *[("softmax", "temperature", t, {}) for t in (0, -1.0, 9e-31, 1.1e30)],
        *[("softmax", "temperature", t, {}) for t in (math.inf, math.nan)],
        ("softmax", "temperature", -2.0, {"learned": True}),
        *[("topk", "k", k, {}) for k in (0, -3, 2.5)],
        *[("topk", "floor", floor, {}) for floor in (-0.1, 0.0, 1.0)],
        *[("evsoftmax", "floor", floor, {}) for floor in (-0.1, 0.0, 1.0, math.nan)],
        *[("entmax", "alpha", alpha, {}) for alpha in (0.99, -1.0, math.inf, math.nan)],
        *[("entmax", "alpha", alpha, {"learned": True}) for alpha in (1.0, 2.0, 2.5)],
        ("entmax", "heads", 4, {}),
        ("entmax", "heads", 0, {"learned": True}),
        *[("multimax", "order", order, {}) for order in (0, -1, 1.5, 9)],
        ("multimax", "init", "zeros", {}),
        *[("softmax", "softcap", cap, {}) for cap in (0, -1.0, math.inf, math.nan)],
        *[("multimax", "sink", sink, {}) for sink in (-math.inf, math.nan)],
        *[("softpick", "eps", eps, {}) for eps in (0, -1.0, math.inf, math.nan)],
        *[
            (name, "length_scale", "row", {})
            for name in registered_normalizers()[:-1]
            if name != "asentmax"
        ],
        *[("asentmax", "reference_length", length, {}) for length in (1, 2.5)],
        *[(name, "heads", 0, {"length_scale": "scores"}) for name in ("topk", "multimax")],
        *[(name, "heads", 2, {}) for name in ("softmax", "sparsemax", "evsoftmax", "sigmoid")],
        ("softmax", "heads", 2, {"sink": 0.0, "learned_sink": False}),
    ],
)
def test_an_option_out_of_range_names_its_value(name, option, value, others):
    with pytest.raises(ValueError, match=option) as error:
        build_normalizer(name, **{option: value}, **others)
    if not (option == "floor" and value == 0):  # that message tells why 0 is too small
        assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("softmax", "temperature", 1e-30), ("softmax", "temperature", 1e30), ("multimax", "order", 8)],
)
def test_the_ends_of_a_range_are_inside(name, option, value):
    assert getattr(build_normalizer(name, **{option: value}), option) == value
