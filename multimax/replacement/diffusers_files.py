"""Models of diffusers that were saved with another normalizer."""

from collections.abc import Collection, Mapping
from typing import Any

from multimax.normalizers import Normalizer
from multimax.replacement.replace import replace_softmax

# Options of `from_pretrained` that say where the configuration is, too.
PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load(model_class: Any, name: Any, also: Collection[type], options: Mapping[str, Any]) -> Any:
    """See `load_pretrained`, which calls it.

    Args:
        model_class: a model class of diffusers, or its AutoModel.
        name: a folder, or a name on the hub.
        also: as given to `replace_softmax`.
        options: of `from_pretrained`.

    Raises:
        ValueError: it was not saved with another normalizer, or scalars are missing in its files.
    """
    import diffusers

    place = {key: options[key] for key in PLACE if key in options}
    config = model_class.load_config(name, **place)
    arguments = config.get("multimax")
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{name} was not saved with another normalizer: use "
            f"{model_class.__name__}.from_pretrained and replace_softmax"
        )
    own = getattr(diffusers, config["_class_name"], model_class)
    if model_class is not diffusers.AutoModel and not issubclass(own, model_class):
        raise ValueError(f"{name} is a {own.__name__}, not a {model_class.__name__}")

    def from_config(_: Any, config: Mapping[str, Any], **more: Any) -> Any:
        known = {key: value for key, value in config.items() if key != "multimax"}
        model = own.from_config(known, **more)
        replace_softmax(model, also=also, **arguments)
        return model

    loaded_class = type(own.__name__, (own,), {"from_config": classmethod(from_config)})
    wants_report = options.get("output_loading_info", False)
    model, report = loaded_class.from_pretrained(name, **{**options, "output_loading_info": True})
    missing = sorted(key for key in report["missing_keys"] if "normalizer" in key.split("."))
    if missing or not any(isinstance(module, Normalizer) for module in model.modules()):
        raise ValueError(f"{name} has no scalars for {', '.join(missing)}: it is another model")
    return (model, report) if wants_report else model
