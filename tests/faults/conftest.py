"""Fixtures of the faults: one lab, and the undisturbed runs, for all tests of a process."""

from collections.abc import Iterator

import pytest

from rebeca_ray.config.decoder import DecoderSettings
from tests.faults.campaign import Campaign
from tests.faults.outage import RemoteLab
from tests.faults.world import Lab
from tests.faulty_s3 import FaultyS3


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults") / "lab", tiny_decoder)


@pytest.fixture(scope="session")
def campaign(lab: Lab) -> Campaign:
    return Campaign.of(lab)


@pytest.fixture
def remote_campaign(campaign: Campaign, proxy: FaultyS3) -> Iterator[Campaign]:
    campaign.remote = RemoteLab(campaign.lab, proxy)
    yield campaign
    campaign.remote = None
