"""Every registered normalizer, and the options that take another path."""

import torch

from multimax import build_normalizer, registered_normalizers

# Every registered normalizer with its defaults, and options that take another path.
CASES: dict[str, tuple[str, dict]] = {name: (name, {}) for name in registered_normalizers()}
CASES |= {
    "softmax-cold": ("softmax", {"temperature": 0.5}),
    "softmax-learned": ("softmax", {"temperature": 2.0, "learned": True}),
    "topk-1": ("topk", {"k": 1}),
    "topk-3": ("topk", {"k": 3}),
    "entmax-softmax": ("entmax", {"alpha": 1.0}),
    "entmax-1.2": ("entmax", {"alpha": 1.2}),
    "entmax-2.5": ("entmax", {"alpha": 2.5}),
    "entmax-learned": ("entmax", {"alpha": 1.4, "learned": True}),
    "evsoftmax-training": ("evsoftmax", {"floor": 1e-3}),
    "multimax-identity": ("multimax", {"init": "identity"}),
    "multimax-1": ("multimax", {"order": 1}),
    "multimax-3": ("multimax", {"order": 3}),
    "multimax-affine": ("multimax", {"affine": True}),
    "multimax-before-scale": ("multimax", {"affine": True, "score_scale": 0.4}),
    "multimax-scaled": ("multimax", {"length_scale": "modulated"}),
    "multimax-steps": (
        "multimax",
        {"order": 1, "affine": True, "length_scale": "scores", "softcap": 8.0, "sink": 0.5},
    ),
}
# Whose rows do not sum to one.
WEIGHTS = ("softpick", "sigmoid", "multimax-steps")


def build_case(case):
    """The normalizer of a case, with learned scalars at a random place."""
    name, options = CASES[case]
    module = build_normalizer(name, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # away from the symmetric or identity start
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.train(case.endswith("training"))
