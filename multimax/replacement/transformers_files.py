"""Models of transformers, or of diffusers, that were saved with another normalizer."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from multimax.replacement import diffusers_files, heads, routes
from multimax.replacement.replace import replace_softmax
from multimax.replacement.transformers_route import configurations

# Options of `from_pretrained` that say where the configuration is, too.
PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_pretrained(
    model_class: Any, name: Any, *, also: Collection[type] = (), **options: Any
) -> Any:
    """A model of transformers or diffusers, saved after `replace_softmax`, with its scalars.

        model = load_pretrained(AutoModelForCausalLM, "folder")

    Args:
        model_class: a model class or an "Auto" class of these libraries.
        name: a folder, or a name on the hub.
        also: as given to `replace_softmax`.
        options: of `from_pretrained`.

    Raises:
        ValueError: it was not saved with another normalizer, or scalars are missing in its files.
    """
    if any(base.__module__.startswith("diffusers.") for base in model_class.__mro__):
        return diffusers_files.load(model_class, name, also, options)
    from transformers import AutoConfig

    config = options.pop("config", None)
    if config is None:
        config_class = getattr(model_class, "config_class", None) or AutoConfig
        place = {key: options[key] for key in PLACE if key in options}
        config = config_class.from_pretrained(name, **place)
    arguments = getattr(config, "multimax", None)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{name} was not saved with another normalizer: use "
            f"{model_class.__name__}.from_pretrained and replace_softmax"
        )
    for each in configurations(config):
        vars(each).pop("multimax", None)
        each._attn_implementation = None  # as transformers chooses, or as in `options`
    own = _own_class(model_class, config)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__(self, *args, **kwargs)
        replace_softmax(self, also=also, **_arguments(self, arguments, also))

    loaded_class = type(own.__name__, (own,), {"__init__": init, "__module__": own.__module__})
    wants_report = options.pop("output_loading_info", False)
    model, report = loaded_class.from_pretrained(
        name, config=config, output_loading_info=True, **options
    )
    model.__class__ = own
    missing = sorted(key for key in report["missing_keys"] if "normalizer" in key.split("."))
    if missing:
        raise ValueError(f"{name} has no scalars for {', '.join(missing)}: it is another model")
    return (model, report) if wants_report else model


def _own_class(model_class: Any, config: Any) -> Any:
    """The model class that an "Auto" class stands for."""
    if not hasattr(model_class, "_model_mapping"):
        return model_class
    from transformers.models.auto.auto_factory import _get_model_class

    return _get_model_class(config, model_class._model_mapping)


def _arguments(
    model: nn.Module, saved: Mapping[str, Any], also: Collection[type]
) -> dict[str, Any]:
    """Arguments of `replace_softmax` for a model that may be a part of the saved one."""
    names = [found.name for found in routes.find(model, also, saved["bias_place"])]
    skip = [name for name in names if any(_same(name, skipped) for skipped in saved["skip"])]
    output = saved["output"] and heads.output_layer(model) is not None
    return {**saved, "skip": skip, "output": output}


def _same(name: str, saved: str) -> bool:
    """Whether names mean one module, in a model and in the one around it."""
    return f".{name}".endswith(f".{saved}") or f".{saved}".endswith(f".{name}")
