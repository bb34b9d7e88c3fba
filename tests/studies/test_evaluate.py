"""`rebeca evaluate` on published catalogs: its files, its comparisons, and its refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.data.captions import Captions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.schemas import TRAINING
from rebeca_ray.storage.filesystem import exists, list_files
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.studies import verifying
from rebeca_ray.studies.evaluate import check_fit, different, evaluate
from rebeca_ray.studies.metrics import Metrics, schema
from rebeca_ray.studies.ratings import StudyRatings, read_ratings
from rebeca_ray.studies.report import write_report
from rebeca_ray.studies.topics import CaptionSource
from rebeca_ray.studies.verifying import check_apart, fit_study_verifier
from tests.studies.conftest import NUM_USERS, STUDY_USERS, publish_catalog


def test_two_catalogs_are_compared_user_by_user(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    first = publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS)
    second = publish_catalog(tmp_path / "second", tiny_decoder, STUDY_USERS[:-1], num_images=2, seed=1)
    study = study.model_copy(update={"catalog": first.root, "other": second.root})
    users = len(STUDY_USERS) - 1

    def true_like(owners: list[str], encoded: list[bytes]) -> np.ndarray:
        assert all(image.startswith(b"\x89PNG") for image in encoded)
        return np.array([int(owner[1:]) / 64 for owner in owners])

    result = evaluate(study, true_like)
    page = Path(write_report(result, study.out, None))
    metrics = Metrics.model_validate(json.loads(Path(study.out, "metrics.json").read_text()))
    assert metrics == result.metrics
    assert [(part.users, part.items) for part in metrics.sets] == [(users, 3 * users), (users, 2 * users)]
    # The items of every user are liked as much in one catalog as in the other.
    truth = metrics.sets[0].true_like_probability
    assert truth is not None
    assert truth.mean == pytest.approx(np.mean([number / 64 for number in range(users)]))
    compared = {row.figure: row for row in metrics.comparisons}
    assert compared["true_like_probability"].difference == pytest.approx(0, abs=1e-12)
    assert compared["true_like_probability"].wilcoxon_p > 0.05
    assert compared["planned/vendi"].difference > 0  # three items differ more than two
    table = read_table(f"{study.out}/users.parquet", "users").to_pylist()
    assert [(row["set"], row["user_id"]) for row in table] == [
        (name, user) for name in ("catalog", "other") for user in STUDY_USERS[:-1]
    ]
    mean = np.mean([row["planned/like_probability"] for row in table[:users]])
    assert mean == pytest.approx(metrics.sets[0].spaces["planned"].like_probability.mean, abs=1e-6)
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # the page needs no other file
    assert text.count("data:image/png;base64,") >= 6
    for name in ("permutation", "calibration", "means", "users", "gains", "wins"):
        assert Path(study.out, f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_methods_are_sets_beside_the_catalog(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    """A prompt alone plans no embeddings, so it has no figures in that space. No CLIP here fits the items."""
    snapshot = publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS)
    methods = {
        "methods": ("p1", "random"),
        "prior": str(tmp_path / "first" / "prior"),
        "decoder": tiny_decoder,
    }
    study = study.model_copy(update={"catalog": snapshot.root, **methods})
    result = evaluate(study, lambda owners, _: np.array([int(owner[1:]) / 64 for owner in owners]))
    assert [part.name for part in result.metrics.sets] == ["catalog", "p1", "random"]
    assert [list(part.spaces) for part in result.metrics.sets] == [["planned"], [], ["planned"]]
    assert {row.right for row in result.metrics.comparisons} == {"p1", "random"}
    table = read_table(f"{study.out}/users.parquet", "users")
    assert table["planned/vendi"].null_count == len(STUDY_USERS)
    assert table["true_like_probability"].null_count == 0
    page = Path(write_report(result, study.out, None)).read_text()
    for name in ("catalog", "random"):
        assert f"<td>{name}, planned</td>" in page  # its distances
    assert "<td>p1, planned</td>" not in page
    assert Path(study.out, "wins.png").exists()


def test_one_catalog_is_evaluated_again_with_the_same_figures(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    study = study.model_copy(
        update={"catalog": publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS).root}
    )
    first = evaluate(study).metrics
    assert first.comparisons == []
    assert first.sets[0].true_like_probability is None
    assert evaluate(study).metrics == first
    thinned = evaluate(study.model_copy(update={"num_users": 20}))
    assert thinned.sets[0].items.user_id[0] == STUDY_USERS[0]
    assert thinned.sets[0].items.user_id[-1] == STUDY_USERS[-1]
    assert len(thinned.sets[0].items.user_id) == 20


def test_too_few_users_are_named(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    few = publish_catalog(tmp_path / "few", tiny_decoder, [*STUDY_USERS[:5], "stranger"])
    with pytest.raises(
        InputError, match=r"6 users with two items or more, 5 of them .* expected at least 20"
    ):
        evaluate(study.model_copy(update={"catalog": few.root}))
    single = publish_catalog(tmp_path / "single", tiny_decoder, STUDY_USERS, num_images=1)
    with pytest.raises(InputError, match="0 users with two items or more"):
        evaluate(study.model_copy(update={"catalog": single.root}))
    assert not Path(study.out, "metrics.json").exists()


def test_the_published_schema_is_that_of_the_models() -> None:
    page = Path(__file__).parents[2] / "infra" / "docs" / "metrics.schema.json"
    assert page.read_text() == schema() + "\n", "run `make docs`"


def test_models_that_did_not_make_the_catalog_are_refused(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    catalog = publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS)
    publish_catalog(tmp_path / "second", tiny_decoder, STUDY_USERS[:2], seed=1)
    study = study.model_copy(
        update={
            "catalog": catalog.root,
            "decoder": tiny_decoder,
            "prior": str(tmp_path / "first" / "prior"),
            "methods": ("rebeca_p1",),
        }
    )
    others = (
        ("prior", str(tmp_path / "second" / "prior")),
        ("decoder", tiny_decoder.model_copy(update={"num_inference_steps": 2})),
    )
    for name, other in others:
        with pytest.raises(InputError, match=f"^{name}: its fingerprint is .*; that of catalog "):
            evaluate(study.model_copy(update={name: other}))
    assert not Path(study.out, "sets").exists()


def test_two_sources_of_captions_have_two_names() -> None:
    source = CaptionSource(
        name="style",
        real=Captions(item_id=np.array(["i"], object), caption=np.array(["red"], object)),
        caption=lambda encoded: ["red"] * len(encoded),
    )
    assert different([source, replace(source, name="content")])
    with pytest.raises(InputError, match="captions: two sources are named style"):
        different([source, source])


def test_a_test_split_is_needed(study: EvaluateConfig) -> None:
    without = study.model_copy(update={"interactions": study.interactions.model_copy(update={"test": 0.0})})
    with pytest.raises(InputError, match="interactions.test is 0; set it to the value of the training"):
        evaluate(without)


def test_the_seed_of_the_selector_is_refused(study: EvaluateConfig) -> None:
    ratings = read_ratings(study.interactions, read_image_embeds(study.items))
    with pytest.raises(InputError, match="the selector uses 42 too"):
        check_apart(ratings, study.model_copy(update={"training_seed": study.verifier_seed}))


def test_the_verifier_reads_no_rating_of_the_training(
    study: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:

    ratings = read_ratings(study.interactions, read_image_embeds(study.items))
    read: list[int] = []
    fit = verifying.fit_selector

    def counting(blocks: list, x_ID: np.ndarray, seed: int) -> object:  # type: ignore[type-arg]
        read.append(sum(int(block.counts_V.sum()) for block in blocks))
        return fit(blocks, x_ID, seed)

    monkeypatch.setattr(verifying, "fit_selector", counting)
    fit_study_verifier(ratings, study)
    is_training = ratings.interactions.split == TRAINING
    assert read[0] == int(ratings.parts.fit_N.sum())
    assert read[1] < read[0]
    assert not (is_training & (ratings.parts.fit_N | ratings.parts.test_N)).any()
    assert not (ratings.parts.fit_N & ratings.parts.test_N).any()

    leaky = StudyRatings(
        interactions=ratings.interactions,
        items=ratings.items,
        item_N=ratings.item_N,
        parts=ratings.parts._replace(fit_N=ratings.parts.fit_N | is_training),
    )
    with pytest.raises(InputError, match="were seen by the selector"):
        check_apart(leaky, study)


@pytest.mark.parametrize("kind", ["bilinear", "ncf"])
def test_the_papers_verifiers_serve_too(study: EvaluateConfig, kind: str) -> None:

    verifier = VerifierSettings().model_copy(
        update={"kind": kind, "max_epochs": 100, "early_stopping_patience": 10, "hidden_sizes": (16, 8)}
    )
    config = study.model_copy(
        update={"verifier": verifier, "num_factors_tried": (4, 8), "weight_decay_tried": (1e-2,)}
    )
    ratings = read_ratings(study.interactions, read_image_embeds(study.items))
    _, figures = fit_study_verifier(ratings, config)
    assert figures.kind == kind
    assert figures.num_factors in (4, 8)
    assert figures.seen.auc.value > 0.8
    assert figures.seen.auc.num_users == NUM_USERS


def test_embeddings_of_another_size_are_refused(
    study: EvaluateConfig, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:

    with pytest.raises(
        InputError, match="embeddings of size 32; .* 16; give the items that its prior was trained"
    ):
        check_fit("/catalog", 32, read_image_embeds(study.items), study.items)


def test_methods_and_results_on_s3(
    study: EvaluateConfig,
    tmp_path: Path,
    tiny_decoder: DecoderSettings,
    s3_server: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All files of the results are there, and the images of a method are drawn once."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    catalog = publish_catalog(tmp_path / "first", tiny_decoder, STUDY_USERS)
    out = f"s3://rebeca/{uuid4().hex}"
    study = study.model_copy(
        update={
            "catalog": catalog.root,
            "decoder": tiny_decoder,
            "prior": str(tmp_path / "first" / "prior"),
            "methods": ("rebeca_p1",),
            "out": out,
        }
    )
    first = evaluate(study)
    write_report(first, out, None)
    for name in ("metrics.json", "users.parquet", "report.html", "permutation.png"):
        assert exists(f"{out}/{name}"), name
    assert len(list_files(f"{out}/sets", ".parquet")) == 1
    monkeypatch.setattr("rebeca_ray.studies.evaluate.build_decoder", lambda settings: None)
    assert evaluate(study).sets[1].items.encoded == first.sets[1].items.encoded
