"""A world of three tastes: 24 users, 150 items, and catalogs for them made without a decoder's help."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import NetworkSettings, SamplerSettings
from rebeca_ray.data.captions import Captions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.studies import evaluate, verifying
from rebeca_ray.studies.measure import Judge
from rebeca_ray.studies.methods import Materials
from rebeca_ray.studies.ratings import read_ratings
from rebeca_ray.studies.sets import read_set
from rebeca_ray.studies.verifying import fit_study_verifier
from tests.conftest import NO_GATE, D, prior_users, untrained_prior, write_tiny_prior

NUM_USERS, ITEMS_PER_TASTE, TASTES = 24, 50, 3
WORDS = ("red cat", "green dog", "blue bird")  # of the tastes
STUDY_USERS = [f"u{user:02}" for user in range(NUM_USERS)]


def item_embeds() -> np.ndarray:
    """Return the embeddings of the items: 50 around each of three centres."""
    random = np.random.default_rng(0)
    centre = random.standard_normal((TASTES, D))
    noise = 0.4 * random.standard_normal((TASTES * ITEMS_PER_TASTE, D))
    return (np.repeat(centre, ITEMS_PER_TASTE, axis=0) + noise).astype(np.float32)


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw few bootstrap samples and permutations: intervals are tested elsewhere."""
    monkeypatch.setattr(verifying, "NUM_SAMPLES", 20)
    monkeypatch.setattr(evaluate, "NUM_PERMUTATIONS", 200)


@pytest.fixture
def study(tmp_path: Path) -> EvaluateConfig:
    """Users who like the items of one taste: u00, u03, … the first. The catalog is not there yet."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(item_embeds().ravel()), type=schemas.image_embeds(D))
    items = [f"i{item:03}" for item in range(TASTES * ITEMS_PER_TASTE)]
    pq.write_table(pa.table({"item_id": items, "image_embeds": column}), tmp_path / "items.parquet")
    random = np.random.default_rng(1)
    rows = [
        (user, items[item], 5.0 if item // ITEMS_PER_TASTE == number % TASTES else 1.0)
        for number, user in enumerate(STUDY_USERS)
        for item in random.permutation(len(items))[:80].tolist()
    ]
    user_id, item_id, rating = zip(*rows, strict=True)
    columns = {"user_id": user_id, "item_id": item_id, "rating": pa.array(rating, pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    return EvaluateConfig.model_validate(
        {
            "catalog": str(tmp_path / "catalog"),
            "items": str(tmp_path / "items.parquet"),
            "interactions": {
                "path": str(tmp_path / "interactions.parquet"),
                "hold_out": 0.2,
                "test": 0.3,
            },
            "out": str(tmp_path / "out"),
        }
    )


def publish_catalog(
    folder: Path, decoder: DecoderSettings, users: list[str], *, num_images: int = 3, seed: int = 0
) -> Snapshot:
    """Publish a catalog of an untrained prior, which knows nothing of the tastes."""
    folder.mkdir()
    pq.write_table(pa.table({"user_id": users}), folder / "request.parquet")
    config = GenerateConfig(
        prior=write_tiny_prior(folder, users=prior_users(users), norm=3.0 + seed),
        decoder=decoder,
        request=str(folder / "request.parquet"),
        catalog=str(folder / "catalog"),
        num_images=num_images,
        sampler=SamplerSettings(num_inference_steps=4, batch_size=32, prior_guidance_scale=1.0),
        gate=NO_GATE,
    )
    generate_catalog(config, in_process=True)
    return read_catalog(config.catalog)


def captions_of_tastes(item_id: np.ndarray) -> Captions:
    """Return the caption of each item: two words of its taste."""
    texts = [WORDS[row // ITEMS_PER_TASTE] for row in range(len(item_id))]
    return Captions(item_id=item_id, caption=np.array(texts, object))


@pytest.fixture
def materials(study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings) -> Materials:
    snapshot = publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS)
    ratings = read_ratings(study.interactions, read_image_embeds(study.items))
    verifier, _ = fit_study_verifier(ratings, study)
    (tmp_path / "judging").mkdir()
    prior = load_prior(
        write_tiny_prior(tmp_path / "judging", users=prior_users(STUDY_USERS), selector=Selector(D, 8))
    )
    network = NetworkSettings(num_layers=2, num_heads=2, width=16, num_tokens=2, user_encoder="none")
    return Materials(
        catalog=read_set("catalog", snapshot, STUDY_USERS),
        judge=Judge(
            ratings=ratings,
            verifier=verifier,
            user_U=np.arange(NUM_USERS),
            max_item_similarity=0.98,
            num_permutations=100,
            seed=0,
        ),
        prior=prior,
        captions=[captions_of_tastes(ratings.items.item_id)],
        without_users=untrained_prior(network, D),
        seed=3,
    )
