"""Estimate a run before it starts: decide as the run would, and forecast its cost."""

from datetime import UTC, datetime

from rebeca_ray.catalog.layout import Run, new_run_id
from rebeca_ray.catalog.manifest import Cost
from rebeca_ray.catalog.read import published
from rebeca_ray.catalog.runs import BegunRun, write_begun
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.generation.context import RunContext, identify_models
from rebeca_ray.generation.cost import forecast
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.plan import request_histories
from rebeca_ray.generation.request import check_request
from rebeca_ray.storage.filesystem import delete


def estimate(config: GenerateConfig, *, images_per_second: float | None = None) -> Cost:
    """Forecast the cost of `generate_catalog` tonight on the actors that `config` names.

    Nothing is sampled. Everything it writes it removes, except embeddings of rated items, which the next run
    needs too. Raises InputError for bad input, and without `images_per_second` (of one decoder actor) if no
    run measured it.
    """
    decoder = identify_decoder(config.decoder)
    requested = check_request(config, decoder)
    previous = published(config.catalog)
    if previous is None and images_per_second is None:
        raise InputError(
            f"catalog {config.catalog}: no run has measured anything there yet; "
            "give --images-per-second of one decoder actor, or generate for a few users first"
        )
    now = datetime.now(UTC)
    context = RunContext(
        config=config,
        run=Run(
            root=config.catalog.rstrip("/"),
            run_date=config.date().isoformat(),
            run_id=f"estimate-{new_run_id()}",
            fencing_token=0,
        ),
        models=identify_models(config, decoder),
        previous=previous,
        requested=requested,
        began_at=now,
    )
    # With a record, no garbage collection takes the work folder meanwhile.
    begun_at = now.isoformat(timespec="seconds")
    record = BegunRun(run_id=context.run.run_id, run_date="estimate", begun_at=begun_at, described={})
    write_begun(config.catalog, record)
    try:
        histories = request_histories(config, context.run)
        decisions = decide_all(context, histories, lambda: None)
    finally:
        delete(context.run.work)
    return forecast(context, decisions, images_per_second)
