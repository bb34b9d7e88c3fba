"""Load the networks with the engine that the settings name."""

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.networks import Networks, load_torch_networks


def load_networks(settings: DecoderSettings) -> Networks:
    """Load what `settings.engine` runs. Raises UserError if weights or engines are missing, pickles, or made for something else."""
    if settings.engine == "onnx":
        from rebeca_ray.decoder.onnx_engine import load_onnx_networks

        return load_onnx_networks(settings)
    if settings.engine == "tensorrt":
        from rebeca_ray.decoder.tensorrt_engine import load_tensorrt_networks

        return load_tensorrt_networks(settings)
    return load_torch_networks(settings)
