"""The main job: plan, test the plan, render, assemble, publish. Nothing is visible to a reader before the last line."""

import time
from typing import Any

import rebeca_ray
from rebeca_ray.catalog.assemble import assemble
from rebeca_ray.catalog.gate import check_plan
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.publish import publish
from rebeca_ray.catalog.read import published
from rebeca_ray.checkpoint import fingerprint, load_prior, read_prior_config
from rebeca_ray.cluster import require_room, start_ray
from rebeca_ray.config import GenerateConfig
from rebeca_ray.decoder_files import identify_decoder
from rebeca_ray.errors import UserError
from rebeca_ray.planning import plan_items
from rebeca_ray.rendering import check_renderer, render_items
from rebeca_ray.request import check_request
from rebeca_ray.storage import join, open_filesystem, require_writable


def generate_catalog(config: GenerateConfig) -> dict[str, Any]:
    """Generate and publish one snapshot; returns its manifest with the seconds of each stage under `seconds`."""
    decoder = identify_decoder(config.decoder)
    requested = check_request(config, decoder)
    require_writable(config.root, "root")
    run = Run.start(config)
    for place in (join(run.root, run.snapshot), join(run.root, run.images), run.work):
        filesystem, path = open_filesystem(place)
        if filesystem.exists(path):
            raise UserError(f"root {config.root}: run_id {run.run_id} was used before ({place} is there); choose another, or give none")
    published(run.root)  # a damaged one is found now, not after rendering
    versions = {
        "prior": fingerprint(read_prior_config(config.prior)),
        "decoder": decoder.fingerprint(config.decoder),
        "code": rebeca_ray.__version__,
    }
    load_prior(config.prior)  # a damaged one is found now, not by every actor
    start_ray()
    sampler, decoding = config.sampler, config.decoder
    require_room("sampler.num_actors", workers=sampler.num_actors, cpus=sampler.cpus_per_actor, device=sampler.device, spare_cpus=1)
    served = decoding.backend == "triton"  # then the GPU is the server's
    device, slots = ("cpu", decoding.num_actors) if served else (decoding.device, 0)
    require_room(
        "decoder.num_actors",
        workers=decoding.num_actors,
        cpus=decoding.cpus_per_actor,
        device=device,
        spare_cpus=1,
        decoder_slots=slots,
    )
    check_renderer(decoding)
    seconds = {}
    started = time.perf_counter()
    plan_items(config, run, versions)
    permutation = check_plan(run, config.gate)
    seconds["plan"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    render_items(config, run)
    seconds["render"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    manifest = assemble(
        run,
        requested=requested,
        error_budget=config.error_budget,
        max_safety_probability=config.decoder.safety.max_probability,
        versions=versions,
        quality={"permutation": permutation.figures() if permutation else None},
        decoder_weights=decoder.weights,
    )
    publish(run.root, run.snapshot, run_id=run.run_id, run_date=run.run_date, epoch=run.epoch)
    seconds["assemble"] = round(time.perf_counter() - started, 2)
    return {**manifest, "seconds": seconds}
