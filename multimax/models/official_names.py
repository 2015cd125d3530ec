"""The names of the scalars in checkpoints of the official MultiMax code (vision), and ours.

There, the modulator of block i is `blocks.{i}.attn.ts` and `.ranges`, and that of the output layer
is `ts` and `ranges`; here they belong to a normalizer: `blocks.{i}.attn.normalizer.ts` and
`output.ts`. All other names are timm's in both.
"""

import re
from typing import Any

from torch import Tensor, nn

_NAMES = re.compile(r"(?P<block>blocks\.\d+\.attn\.)?(?P<scalars>ts|ranges)")
_OUR_NAMES = re.compile(r"(?:output|(?P<block>blocks\.\d+\.attn)\.normalizer)\.(?P<scalars>.+)")


def rename_official_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Give official names in `state_dict`, in place, the names that `module` uses.

    A `register_load_state_dict_pre_hook`, so that `load_state_dict` takes either layout. Our own
    names pass unchanged.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        match = _NAMES.fullmatch(key, len(prefix))
        if match:
            owner = f"{match['block']}normalizer." if match["block"] else "output."
            state_dict[prefix + owner + match["scalars"]] = state_dict.pop(key)


def to_official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a vision transformer under the official names.

    Raises:
        ValueError: a normalizer holds something that the official layout has no name for.
    """
    official = {}
    for key, value in model.state_dict().items():
        match = _OUR_NAMES.fullmatch(key)
        if match and match["scalars"] not in ("ts", "ranges"):
            raise ValueError(
                f"the official layout has no place for {key}: it knows only MultiMax with "
                "affine=False, and plain SoftMax"
            )
        if match:
            key = f"{match['block']}.{match['scalars']}" if match["block"] else match["scalars"]
        official[key] = value
    return official
