"""The kinds of faults: each strikes a running night at one moment, in real processes and servers."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable

from tests.faults.real.world import World
from tests.faulty_s3 import Fault

WAIT_SECONDS = 20  # for a worker to kill, which starts late on a busy machine
STAGES = ("start", "histories", "decide", "plan", "test", "render", "assemble")
Strike = Callable[[World, random.Random], bool]  # returns whether it met anything


def kill_one(*names: str) -> Strike:
    """Return a strike that kills one of Ray's workers by SIGKILL."""

    def strike(world: World, generator: random.Random) -> bool:
        until = time.monotonic() + WAIT_SECONDS
        while not (workers := world.workers(*names)):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        os.kill(generator.choice(sorted(workers, key=lambda worker: worker.pid)).pid, signal.SIGKILL)
        return True

    return strike


def kill_raylet(world: World, generator: random.Random) -> bool:
    """Kill the only raylet with CPUs; another node joins up to 20 s later."""
    world.remove_node(kill=True)
    time.sleep(generator.uniform(0, 20))
    world.add_node()
    return True


def exchange_node(world: World, generator: random.Random) -> bool:
    """Add a node, and remove the one with the actors once the new one is there."""
    world.add_node()
    time.sleep(generator.uniform(0, 4))
    world.remove_node(kill=False)
    return True


def remove_node(world: World, generator: random.Random) -> bool:
    """Remove the only node with CPUs in order; another joins up to 20 s later."""
    world.remove_node(kill=False)
    time.sleep(generator.uniform(0, 20))
    world.add_node()
    return True


def add_node(world: World, generator: random.Random) -> bool:
    world.add_node()
    return True


def restart_s3(world: World, generator: random.Random) -> bool:
    """Stop the S3 server, and start it again up to 30 s later."""
    world.stop_s3()
    time.sleep(generator.uniform(0, 30))
    world.start_s3()
    return True


def burst(fault: Fault, most: int) -> Strike:
    """Return a strike that spoils up to `most` of the next requests in a row."""

    def strike(world: World, generator: random.Random) -> bool:
        world.proxy.misbehave(itertools.repeat(fault, generator.randint(1, most)))
        until = time.monotonic() + 10
        while time.monotonic() < until and not world.proxy.requests:
            time.sleep(0.05)
        return bool(world.proxy.requests)

    return strike


def fill_disk(world: World, generator: random.Random) -> bool:
    """Fill the disk of the catalog for a few seconds."""
    filler = world.disk / "filler"
    try:
        with filler.open("wb") as file:
            while True:
                file.write(bytes(2**16))
                file.flush()
    except OSError:
        pass
    time.sleep(generator.uniform(2, 8))
    filler.unlink()
    return True


def restart_triton(world: World, generator: random.Random) -> bool:
    """Kill the Triton server, and start another at its address."""
    world.triton.kill()
    world.triton.wait()
    time.sleep(generator.uniform(0, 5))
    world.start_triton()
    return True


# Kinds that a night may survive without ending: the stages that they strike in, and the strike.
SURVIVED: dict[str, tuple[tuple[str, ...], Strike]] = {
    "plan actor killed": (("plan",), kill_one("PlanUsers")),
    "render actor killed": (("render",), kill_one("OrderedRender")),
    "worker killed": (("plan", "render"), kill_one("ray::")),
    "raylet killed": (("plan", "render"), kill_raylet),
    "node removed": (("plan", "render"), remove_node),
    "node exchanged": (("plan", "render"), exchange_node),
    "node added": (STAGES, add_node),
    "S3 restarted": (STAGES, restart_s3),
    "S3 500": (STAGES, burst("error", 6)),
    "S3 503 slow down": (STAGES, burst("slow down", 6)),
    "S3 answered 500 after the request": (STAGES, burst("lost", 4)),
    "S3 reply cut": (STAGES, burst("cut", 4)),
    "S3 connection closed": (STAGES, burst("gone", 4)),
}
DISK_FULL = "disk full"
TRITON_KILLED = "Triton killed"
STALLED, POISON, TWO_ATTEMPTS = "stalled decoder", "poison row", "two attempts"
DRIVER_KILLED, KILLED_AT_90 = "driver killed", "driver killed at 90%"
DAMAGES = ("file truncated", "file emptied", "file flipped")
ALL_KINDS = (
    *SURVIVED,
    *(DISK_FULL, TRITON_KILLED, STALLED, POISON, TWO_ATTEMPTS, DRIVER_KILLED, KILLED_AT_90),
    *DAMAGES,
)


def damage(world: World, root: str, kind: str, generator: random.Random) -> str | None:
    """Damage one file that an unfinished run wrote; return its path below the root, or None without one."""
    bucket_path = root.removeprefix("s3://")
    before = {str(path.relative_to(world.folder / "first")) for path in (world.folder / "first").rglob("*")}
    files = [
        path
        for path in sorted(world.direct.find(bucket_path))
        if path.removeprefix(f"{bucket_path}/") not in before
        and path.removeprefix(f"{bucket_path}/").startswith(("work/", "images/"))
    ]
    if not files:
        return None
    path = generator.choice(files)
    data = bytearray(world.direct.cat_file(path))
    if kind == "file flipped" and data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    world.direct.pipe_file(
        path,
        bytes(data[: len(data) // 2]) if "truncated" in kind else b"" if "emptied" in kind else bytes(data),
    )
    return str(path.removeprefix(f"{bucket_path}/"))
