"""A night on a cluster whose nodes with decoder slots come late and leave: Ray's autoscaler adds them."""

import time
from collections.abc import Iterator

import pytest
import yaml

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from tests.faults.real.attempt import Night
from tests.faults.real.autoscaling import AutoscalingCluster, autoscaling_cluster
from tests.faults.real.checks import fingerprint
from tests.faults.real.world import World, real_world


@pytest.fixture
def world() -> Iterator[World]:
    with real_world(num_buckets=1) as world:  # decides and assembles without a Ray task
        assert world.expected  # made before the cluster starts
        yield world


@pytest.fixture
def cluster(world: World) -> Iterator[AutoscalingCluster]:
    head, worker = {"CPU": 2.0}, {"CPU": 1.0, "decoder_slot": 1.0}
    with autoscaling_cluster(world.folder, head, worker, max_workers=2) as cluster:
        world.cluster = cluster
        yield cluster


def served(world: World, root: str) -> GenerateConfig:
    """Return tonight's config: each render actor needs a decoder slot."""
    decoder = world.tonight.decoder.model_copy(update={"backend": "triton"})
    return world.tonight.model_copy(update={"catalog": root, "decoder": decoder})


def test_a_night_gets_its_decoder_slot_late_and_another_when_that_node_leaves(
    world: World, cluster: AutoscalingCluster
) -> None:
    expected, root = world.expected, world.prepare("nodes")
    (world.orders / "seconds").write_text("1")  # so that the node leaves in the midst of rendering
    config = served(world, root)
    path = world.folder / "nodes.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"run_date": config.run_date}))
    before = read_catalog(root).run_id
    assert cluster.added_nodes() == []
    night = Night(world, path)
    assert night.wait_for("render"), "\n".join([*night.lines, cluster.log.read_text()])
    (node,) = cluster.added_nodes()
    while not world.drawn() and night.process.poll() is None:
        time.sleep(0.05)
    drawn = set(world.drawn())
    assert drawn < set(world.new_items)  # some are drawn, and some are not
    node.terminate()
    codes = [night.end()]
    if codes == [75]:
        night = Night(world, path)
        codes.append(night.end())
    assert codes in ([0], [75, 0]), "\n".join(night.lines)
    assert night.complaints() == []
    message = "decoder.num_actors: 1 workers need 1 decoder_slots in all, Ray has 0; waiting for the cluster"
    assert any(message in line for line in night.lines)
    assert len(cluster.added_nodes()) == 1
    assert node not in cluster.added_nodes()
    snapshot = read_catalog(root)
    assert snapshot.run_id != before
    assert fingerprint(snapshot) == expected
