"""A process for the tests of the pointer and the lease: `worker.py ROOT NAME DOING [SECONDS [DAYS]]`.

Says `ready` and waits for a line before it begins. DOING is `count`: change the pointer COUNT times; or what to do while it holds the
lease, which it says by `holds EPOCH`: `busy`, `asleep`, or `wait` for another line, then publish. DAYS: its clock is that wrong.
"""

import sys
import time
from dataclasses import replace

from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.pointer import Pointer, change_pointer
from rebeca_ray.errors import UserError

COUNT = 15


def main(root: str, name: str, doing: str, seconds: str = "2", days: str = "0") -> None:
    right = time.time
    time.time = lambda: right() + 86_400 * float(days)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        if doing == "count":
            count(root, name)
        else:
            hold(root, name, doing, float(seconds))
    except UserError:
        from rebeca_ray.cli.runner import plain_errors

        with plain_errors():
            raise


def count(root: str, name: str) -> None:
    for number in range(COUNT):

        def one_more(pointer: Pointer, change: str = f"{name}-{number}") -> Pointer:
            return replace(pointer, fencing_token=pointer.fencing_token + 1, snapshot=change)

        change_pointer(root, one_more)


def hold(root: str, name: str, doing: str, seconds: float) -> None:
    with hold_lease(root, name, seconds) as lease:
        print(f"holds {lease.fencing_token}", flush=True)
        while doing == "busy":
            pass
        while doing == "asleep":
            time.sleep(1000)
        sys.stdin.readline()
        lease.publish(run_id=name, run_date="2026-01-01", snapshot=f"of {name}")
    print("ended", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
