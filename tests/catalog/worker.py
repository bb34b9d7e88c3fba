"""A worker process for the tests of the pointer and the lease: `worker.py ROOT NAME ACTION [SECONDS [DAYS]]`.

It prints `ready` and waits for a line. The action `count` changes the pointer COUNT times. The other actions
acquire a lease of SECONDS and print `holds TOKEN`. Then `busy` uses the CPU for ever, `asleep` sleeps for
ever, and `wait` waits for another line and publishes. The worker's clock is DAYS days fast.
"""

import sys
import time
from dataclasses import replace

from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Pointer, change_pointer
from rebeca_ray.errors import UserError

COUNT = 15


def main(root: str, name: str, action: str, seconds: str = "2", days: str = "0") -> None:
    correct_time = time.time
    time.time = lambda: correct_time() + 86_400 * float(days)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        if action == "count":
            count(root, name)
        else:
            hold(root, name, action, float(seconds))
    except UserError:
        from rebeca_ray.cli.runner import plain_errors

        with plain_errors():
            raise


def count(root: str, name: str) -> None:
    for number in range(COUNT):

        def one_more(pointer: Pointer, change: str = f"{name}-{number}") -> Pointer:
            return replace(pointer, fencing_token=pointer.fencing_token + 1, snapshot=change)

        change_pointer(root, one_more)


def hold(root: str, name: str, action: str, seconds: float) -> None:
    with hold_lease(root, name, seconds) as lease:
        print(f"holds {lease.fencing_token}", flush=True)
        while action == "busy":
            pass
        while action == "asleep":
            time.sleep(1000)
        sys.stdin.readline()
        lease.publish(run_id=name, run_date="2026-01-01", snapshot=f"of {name}")
    print("ended", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
