"""Check that a network fits the embeddings that it shall learn."""

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.errors import InputError


def check_network(config: TrainConfig, embed_dim: int) -> None:
    """Raise InputError unless embeddings of `embed_dim` numbers, and their noise, fit the network."""
    network, target = config.network, config.diffusion.prediction_type
    if network.architecture != "cross_attention" and embed_dim % network.num_tokens:
        raise InputError(
            f"network.num_tokens is {network.num_tokens}: {network.architecture} cuts embeddings of "
            f"{embed_dim} numbers into equal slices; choose a divisor of {embed_dim}"
        )
    if network.architecture == "paper_v1" and (network.width < 4 or network.width % 2):
        raise InputError(
            f"network.width is {network.width}: paper_v1 encodes time in an even number of at least 4 sines "
            "and cosines; choose another num_tokens"
        )
    if network.architecture == "paper_v1" and network.num_tokens * network.width != embed_dim:
        raise InputError(
            f"network.width is {network.width}: a token of paper_v1 is a slice of the embedding, of "
            f"{embed_dim} / num_tokens = {embed_dim // network.num_tokens} numbers; set width to that"
        )
    if target != "sample" and network.num_tokens * network.width < embed_dim:
        raise InputError(
            f"network: {network.num_tokens} tokens of width {network.width} hold fewer than D = {embed_dim} "
            f"numbers, so the network cannot predict {target}; raise num_tokens or width, "
            "or set diffusion.prediction_type=sample"
        )
