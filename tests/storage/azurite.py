"""Azurite, Microsoft's own emulator of Azure Blob Storage, where npm has installed it."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from tests.seaweedfs import free_port

# The account that Azurite documents for everyone. It is no secret.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def installed() -> str | None:
    """Return the path of the server, or None."""
    return shutil.which("azurite-blob")


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """Run the server on 127.0.0.1 with a container `rebeca`; yields its connection string."""
    program = installed()
    assert program
    port = free_port()
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--silent", "--skipApiVersionCheck"], stdout=log, stderr=subprocess.STDOUT
        )
    connection = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url};"
    try:
        wait_until_ready(url, process)
        make_container(connection)
        yield connection
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(150):
        assert process.poll() is None, "Azurite ended by itself"
        try:
            urlopen(url, timeout=2).close()
        except HTTPError:  # it answers
            return
        except URLError:
            time.sleep(0.2)
    raise RuntimeError("Azurite did not start within 30 s")


def make_container(connection: str) -> None:
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(connection) as client:
        client.create_container("rebeca")
