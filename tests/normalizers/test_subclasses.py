"""A subclass that changes the modulation is computed as it says, by no kernel of its parent."""

import pytest
import torch

from multimax import MultiMax, SoftMax, softmax
from multimax.attention import attention
from multimax.losses import linear_output_loss, output_loss


class Doubled(SoftMax):
    def modulate(self, scores):
        return 2 * super().modulate(scores)


class Shifted(MultiMax):
    def forward(self, scores, dim=-1, mask=None):
        return super().forward(scores + 1, dim, mask)


class HalfDescribed(Doubled):
    """Tells the kernels its numbers, but not that they may use them."""

    def modulate(self, scores):
        return super().modulate(scores)

    def coefficients(self, dtype, device):
        return 2 * super().coefficients(dtype, device)


class Described(HalfDescribed):
    """Tells both, and more."""

    def modulate(self, scores):
        return super().modulate(scores)

    @property
    def fusible(self):
        return True

    def coefficients(self, dtype, device):
        return super().coefficients(dtype, device)

    def extra_repr(self):
        return "doubled"


class Renamed(SoftMax):
    def extra_repr(self):
        return "renamed"


@pytest.mark.parametrize(
    ("kind", "fusible"),
    [
        (Doubled, False),
        (Shifted, False),
        (HalfDescribed, False),
        (Described, True),
        (Renamed, True),
    ],
)
def test_only_what_describes_its_modulation_is_fusible(kind, fusible):
    assert kind().fusible is fusible


@pytest.mark.parametrize("kind", [Doubled, HalfDescribed, Described])
def test_the_own_modulation_counts_everywhere(kind, class_scores, targets):
    module = kind()
    torch.testing.assert_close(module(class_scores), softmax(2 * class_scores))
    query, value = class_scores[None, None], torch.eye(5, dtype=torch.float64)[None, None]
    p = softmax(2 * class_scores @ class_scores.t())
    torch.testing.assert_close(attention(query, query, value, module, scale=1.0)[0, 0], p)
    weight = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        linear_output_loss(module, class_scores, weight, targets["hard"]),
        output_loss(SoftMax(), 2 * class_scores, targets["hard"]),
    )


def test_an_unknown_option_of_a_class_is_an_error():
    with pytest.raises(TypeError, match="takes no keyword arguments"):

        class Wrong(SoftMax, option=1):
            pass
