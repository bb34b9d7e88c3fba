"""Build the decoder that the settings name."""

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import with_checker
from rebeca_ray.decoder.interface import Decoder
from rebeca_ray.provenance.signing import check_signing


def check_decoder(settings: DecoderSettings) -> None:
    """Raise the errors for a missing server, safety checker or signature, without loading weights."""
    check_signing(settings)
    if settings.backend == "triton":
        from rebeca_ray.decoder.triton_client import TritonDecoder

        TritonDecoder(settings)
    elif needs_check(settings):
        from rebeca_ray.decoder.safety import load_checker

        load_checker(settings)


def needs_check(settings: DecoderSettings) -> bool:
    """Return whether server, safety checker or signature may be missing. The bundled checker never is."""
    if settings.backend == "triton" or settings.provenance == "c2pa":
        return True
    return with_checker(settings).safety.checker not in ("bundled", "none")


def build_decoder(settings: DecoderSettings) -> Decoder:
    """Return the decoder that `settings.backend` names."""
    if settings.backend == "triton":
        from rebeca_ray.decoder.triton_client import TritonDecoder

        return TritonDecoder(settings)
    from rebeca_ray.decoder.local import LocalDecoder

    return LocalDecoder(settings)
