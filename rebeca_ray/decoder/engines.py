"""Choose the family and the engine that the settings name, and load the networks."""

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.families import sd, sdxl
from rebeca_ray.decoder.files import find_model, read_export
from rebeca_ray.decoder.inspection import family_of
from rebeca_ray.decoder.networks import Family, Networks
from rebeca_ray.errors import InputError


def find_family(name: str) -> Family:
    """Return a family by its name in an export. Raises InputError for an unknown name."""
    families = {family.name: family for family in (sd.FAMILY, sdxl.FAMILY)}
    if name not in families:
        raise InputError(
            f"decoder family {name}: unknown; expected {' or '.join(families)}; export the decoder again"
        )
    return families[name]


def load_networks(settings: DecoderSettings) -> Networks:
    """Load the networks for `settings.engine`. Raises InputError if files are missing or do not fit."""
    if settings.engine == "torch":
        # A model's folder has no family name; its parts tell the family.
        family = sdxl.FAMILY if family_of(settings.model, find_model(settings)) == "sdxl" else sd.FAMILY
        return family.load_networks(settings)
    description = read_export(settings)
    family = find_family(description["family"])
    if settings.engine == "onnx":
        from rebeca_ray.decoder.exported.onnx_engine import load_onnx_networks

        return load_onnx_networks(settings, family, description)
    if settings.engine == "openvino":
        from rebeca_ray.decoder.exported.openvino_engine import load_openvino_networks

        return load_openvino_networks(settings, family, description)
    from rebeca_ray.decoder.exported.tensorrt_engine import load_tensorrt_networks

    return load_tensorrt_networks(settings, family, description)
