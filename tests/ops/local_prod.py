"""Three nights on a small production, each with a fault; then a rollback, an erasure, and a table.

S3, Triton, Ray with a token, Prometheus -> submitted nights, a consumer reads -> claims that held or failed

Its secrets are searched for in all that the servers and the nights have written.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import s3fs
from rich.console import Console
from rich.table import Table

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.catalog.verify import verify
from tests.ops.canaries import LOOPBACK, Canaries, Watch, texts_below, texts_of_store
from tests.ops.cluster import BIN, REPO, Cluster, Ended, Submission, cluster
from tests.ops.consumer import Consumer
from tests.ops.inputs import DATES, NUM_IMAGES, names, overrides, unchanged, write_inputs
from tests.seaweedfs import free_port, seaweedfs
from tests.telemetry.servers import Prometheus, prometheus

ROOT, PRIOR, TRAINING = "s3://rebeca/catalog", "s3://rebeca/prior", "s3://rebeca/train"
CONFIG = "jobs/configs/nightly_stickers.yaml"
ATTEMPTS = 4  # of a submitter for one night
FAULT_SECONDS = 240  # until the state comes that a fault waits for


class Triton:
    """`rebeca serve` with the decoder of the nights."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "triton.log"
        self.ports = {"grpc": free_port(), "http": free_port(), "metrics": free_port()}
        self.url = f"127.0.0.1:{self.ports['grpc']}"
        self.start()

    def start(self) -> None:
        decoder = [line.removeprefix("generate.") for line in overrides(self.url) if ".decoder." in line]
        ports = [part for name, port in self.ports.items() for part in (f"--{name}-port", str(port))]
        config = str(REPO / "jobs/configs/generate_stickers.yaml")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [BIN / "rebeca", "serve", "--config", config, *decoder, *ports], stdout=log, stderr=log
            )

    def kill_and_restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        """Kill the server and its models at once, as the kernel does for want of memory."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait()


class Production:
    """The servers, the nights' submissions, and a record of each claim: whether it held, and a figure."""

    def __init__(self, nodes: Cluster, triton: Triton, store: Any, canaries: Canaries) -> None:
        self.nodes, self.triton, self.store, self.canaries = nodes, triton, store, canaries
        self.held: list[tuple[str, bool, str]] = []
        self.began = time.monotonic()
        self.kept: dict[str, list[str]] = {}  # user -> items of the night before
        self.ended: list[Ended] = []

    def hold(self, claim: str, held: bool, figure: object = "") -> None:
        self.held.append((claim, held, str(figure)))
        print(
            f"{time.monotonic() - self.began:5.0f} s  {'ok  ' if held else 'FAIL'}  {claim}  {figure}",
            flush=True,
        )

    def night(self, night: int, environment: dict[str, str] | None = None) -> Submission:
        changes = [f"run_date={DATES[night]}", *overrides(self.triton.url), *self.canaries.overrides()]
        changes += ["log_level=debug"]  # in which a secret would show up first
        return self.nodes.submit("jobs/nightly.py", "--config", CONFIG, *changes, environment=environment)

    def until_published(self, night: int, running: Submission) -> list[Ended]:
        """Follow a night to its end; submit it again while it ended without success. Return all attempts."""
        attempts = [self.end(running)]
        while attempts[-1].code != 0 and len(attempts) < ATTEMPTS:
            attempts.append(self.end(self.night(night)))
        return attempts

    def end(self, running: Submission) -> Ended:
        self.ended.append(running.end())
        return self.ended[-1]

    def wait_for(self, pattern: str) -> bool:
        """Wait until a file of the running night appears below the catalog."""
        until = time.monotonic() + FAULT_SECONDS
        while time.monotonic() < until:
            self.store.invalidate_cache()
            if self.store.glob(f"rebeca/catalog/work/{pattern}"):
                return True
            time.sleep(0.5)
        return False

    def check(self, night: int) -> None:
        """Note whether a night is complete, without doubles, and keeps items without a reason to change."""
        snapshot = read_catalog(ROOT)
        items = {user: snapshot.for_user(user)["item_id"].to_pylist() for user in names(night)}
        users = sorted(snapshot.table("users")["user_id"].to_pylist())
        lost = sum(len(ids) < NUM_IMAGES for ids in items.values())
        rows = snapshot.table("images", ["item_id"])["item_id"].to_pylist()
        every = [item for ids in items.values() for item in ids]
        doubled = len(every) - len(set(every)) + len(rows) - len(set(rows))
        number = f"night {night + 1}"
        self.hold(f"{number}: published for its date", snapshot.manifest.run_date == str(DATES[night]))
        self.hold(
            f"{number}: nobody lost, nobody left over", users == sorted(names(night)) and not lost, lost
        )
        self.hold(f"{number}: nothing doubled", not doubled, doubled)
        if night:
            kept = all(items[user] == self.kept[user] for user in unchanged(night))
            fresh = [user for user in names(night) if user not in unchanged(night)]
            redrawn = all(items[user] != self.kept.get(user) for user in fresh)
            self.hold(f"{number}: items stay without a reason", kept, f"{len(unchanged(night))} users")
            self.hold(f"{number}: items change with a reason", redrawn, f"{len(fresh)} users")
        self.hold(f"{number}: snapshot intact", not verify(snapshot, "full"))
        self.kept = items


def first_night(prod: Production) -> None:
    """Publish the first night; Triton is killed in the midst of rendering."""
    early = prod.nodes.submit("jobs/generate_catalog.py", f"prior={PRIOR}", f"catalog={ROOT}").end()
    prod.hold(
        "a job without a prior: one line, code 2", early.code == 2 and "rebeca train" in early.log, early.code
    )
    outsider = {**prod.nodes.environment, "HOME": "/nonexistent", "RAY_AUTH_MODE": "disabled"}
    refused = prod.night(0, outsider).end()
    prod.hold("a submitter without the token: refused", refused.code == -1 and "nauthorized" in refused.log)
    running = prod.night(0)
    struck = prod.wait_for("*/records/*/*")
    prod.triton.kill_and_restart()
    attempts = prod.until_published(0, running)
    codes = [attempt.code for attempt in attempts]
    prod.hold("night 1: published, although Triton was killed", struck and codes[-1] == 0, codes)
    prod.check(0)
    again = prod.end(prod.night(0))
    prod.hold("night 1 again: nothing to do", again.code == 0 and "nothing to do" in again.log, again.code)


def second_night(prod: Production) -> None:
    """Publish the second night: two submitters in the same second, and the worker node is lost."""
    rivals = [prod.night(1), prod.night(1)]
    struck = prod.wait_for("*/plan.json")
    prod.nodes.kill_node("worker")
    prod.nodes.start_worker()
    ended = sorted((prod.end(rival) for rival in rivals), key=lambda attempt: attempt.code == 5)
    codes = [attempt.code for attempt in ended]
    prod.hold("night 2: of two starts at once, one ends with 5", codes.count(5) == 1, codes)
    while codes[0] not in (0, 5) and len(codes) < ATTEMPTS + 2:
        codes.insert(0, prod.end(prod.night(1)).code)
    prod.hold("night 2: published, although its node was lost", struck and codes[0] == 0, codes)
    prod.check(1)


def third_night(prod: Production) -> None:
    """Publish the third night; its driver is killed in the midst of rendering."""
    running = prod.night(2)
    struck = prod.wait_for("*/records/*/*")
    prod.nodes.kill_driver("jobs/nightly.py")
    attempts = prod.until_published(2, running)
    codes = [attempt.code for attempt in attempts]
    resumed = any("resuming run" in attempt.log for attempt in attempts)
    prod.hold(
        "night 3: resumed, although its driver was killed", struck and resumed and codes[-1] == 0, codes
    )
    prod.check(2)


def rebeca(*arguments: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [BIN / "rebeca", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)


def days_after(prod: Production, folder: Path) -> None:
    """Verify, roll back, publish again, and erase a user, as a person does from a shell."""
    environment = prod.nodes.environment
    intact = rebeca("catalog", "verify", ROOT, "--level", "full", environment=environment)
    prod.hold("rebeca catalog verify --level full", intact.returncode == 0)
    latest = read_catalog(ROOT).manifest
    back = rebeca("catalog", "rollback", ROOT, environment=environment)
    second = read_catalog(ROOT).manifest.run_date == str(DATES[1])
    prod.hold("rollback publishes night 2", back.returncode == 0 and second)
    forth = rebeca("catalog", "publish", ROOT, "--run-id", latest.run_id, environment=environment)
    prod.hold(
        "publish brings night 3 back", forth.returncode == 0 and read_catalog(ROOT).run_id == latest.run_id
    )

    erased = names(2)[0]
    (folder / "erase.csv").write_text(f"user_id\n{erased}\n")
    options = ["--users", str(folder / "erase.csv"), "--from", PRIOR, "--storage", TRAINING]
    gone = rebeca("catalog", "forget", ROOT, *options, environment=environment)
    prod.hold(
        "an erasure ends with 0", gone.returncode == 0, gone.stderr.strip()[-200:] if gone.returncode else ""
    )
    left = [path for path in files_of(prod.store) if erased.encode() in prod.store.cat_file(path)]
    prod.hold("no byte of the erased id is left", not left, left[:3])
    snapshot = read_catalog(ROOT)
    others = sorted(snapshot.table("users")["user_id"].to_pylist()) == sorted(names(2)[1:])
    prod.hold("all others are still served", others and not verify(snapshot, "full"))


def files_of(store: Any) -> list[str]:
    store.invalidate_cache()
    return [path for root in (ROOT, PRIOR, TRAINING) for path in store.find(root.removeprefix("s3://"))]


def open_gallery(prod: Production, log: Path) -> None:
    """Serve the catalog to people with a token until the log says how to stop it."""
    command = [BIN / "rebeca", "gallery", ROOT, "--bind", "127.0.0.1:0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=prod.nodes.environment, stdout=output, stderr=output)
    until = time.monotonic() + FAULT_SECONDS
    while "Ctrl-C" not in log.read_text() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    prod.hold("the gallery serves with a token", "Ctrl-C" in log.read_text())
    process.terminate()
    process.wait(60)


def check_secrets(prod: Production, folder: Path, watch: Watch) -> None:
    """Note whether a secret shows up anywhere, and whether a server listens beyond loopback."""
    open_gallery(prod, folder / "gallery.log")
    watch.stop()
    nodes = (prod.nodes.folder, f"{prod.nodes.folder}-worker")
    texts = [text for node in nodes for text in texts_below(Path(node))]
    texts += texts_of_store(prod.store, files_of(prod.store))
    texts += [(name, (folder / name).read_bytes()) for name in ("triton.log", "gallery.log")]
    texts += [(f"job {number}", job.log.encode()) for number, job in enumerate(prod.ended)]
    texts += [("processes", "\n".join(watch.lines).encode()), ("metrics", watch.metrics.encode())]
    shown = prod.canaries.shown_in(texts)
    prod.hold("no secret is shown anywhere", not shown, shown[:3] or f"{len(texts)} texts")
    # The search sees what is no secret: in the nodes' files and logs, in rows, processes and metrics.
    run_id = read_catalog(ROOT).run_id.encode()
    seen = [where for where, text in texts if run_id in text]
    searched = [
        any(where.endswith(".parquet") for where in seen),
        any(where.startswith("job ") for where in seen),
        any(where.startswith(node) for node in nodes for where, _ in texts),
        b"ray::" in dict(texts)["processes"],
        b"nv_inference_count" in dict(texts)["metrics"],
    ]
    prod.hold("the search reads all of these", all(searched), searched)
    beyond = {port: ip for port, ip in watch.listening.items() if ip not in LOOPBACK}
    everything = set(prod.triton.ports.values()) <= set(watch.listening)
    figure = beyond or len(watch.listening)
    prod.hold("all other servers listen on loopback alone", everything and not beyond, figure)


def check_metrics(prod: Production, server: Prometheus) -> None:
    """Note whether Prometheus saw the nodes, the nights and Triton's work."""
    for claim, expression in (
        ("metrics: the nodes of Ray", 'count(max_over_time(up{job="ray"}[30m]) == 1) >= 2'),
        ("metrics: Triton's inferences", "sum(max_over_time(nv_inference_request_success[30m])) > 0"),
        ("metrics: rows of rendering", 'sum(max_over_time(ray_rebeca_rows_total{stage="render"}[30m])) > 0'),
        (
            "metrics: the catalog is fresh",
            "time() - max(max_over_time(ray_rebeca_published_timestamp_seconds[30m])) < 600",
        ),
    ):
        series = server.now(expression)
        prod.hold(claim, bool(series), series[0]["value"][1] if series else "no data")


def show(prod: Production) -> bool:
    """Print the table, and the ends of failed jobs if a claim failed; return whether every claim held."""
    if not all(held for _, held, _ in prod.held):
        print(*(f"--- exit code {job.code}\n{job.log[-3000:]}" for job in prod.ended if job.code), sep="\n")
    title = f"A small production for three nights, in {time.monotonic() - prod.began:.0f} s"
    table = Table("claim", "held", "figure", title=title)
    for claim, held, figure in prod.held:
        table.add_row(claim, "yes" if held else "NO", figure)
    Console(width=110).print(table)
    return all(held for _, held, _ in prod.held)


def main() -> int:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ops", dir="/tmp")))
        (folder / "s3").mkdir()
        (folder / "home").mkdir()
        canaries = Canaries(folder)
        environment = stack.enter_context(seaweedfs(folder / "s3")) | canaries.environment
        stack.enter_context(patch.dict("os.environ", environment))
        store = s3fs.S3FileSystem(use_listings_cache=False)
        triton = Triton(folder)
        stack.callback(triton.stop)
        nodes = stack.enter_context(cluster(folder / "home", environment))
        alerts = (REPO / "infra/monitoring/alerts.yaml").read_text()
        metrics = prometheus(folder, Path(nodes.folder), triton.ports["metrics"], alerts, every="5s")
        server = stack.enter_context(metrics)
        write_inputs(folder, store)
        token = (folder / "home" / ".ray" / "auth_token").read_text().strip()
        canaries.needles |= {"Ray's token": token, "S3's key": environment["AWS_SECRET_ACCESS_KEY"]}
        prod, watch = Production(nodes, triton, store, canaries), Watch(nodes)
        consumer = Consumer(ROOT)
        consumer.thread.start()
        watch.thread.start()
        nights: list[Callable[[Production], None]] = [first_night, second_night, third_night]
        try:
            for night in nights:
                night(prod)
            days_after(prod, folder)
        except Exception as error:  # the table shows how far it came
            prod.hold(f"no error: {type(error).__name__}: {error}", held=False)
        consumer.stop()
        reads = sum(consumer.reads.values())
        prod.hold(
            "the consumer never saw half a snapshot", not consumer.problems, consumer.problems[:3] or reads
        )
        prod.hold("the consumer saw every night", len(consumer.reads) >= len(DATES), len(consumer.reads))
        check_metrics(prod, server)
        check_secrets(prod, folder, watch)
        return 0 if show(prod) else 1


if __name__ == "__main__":
    sys.exit(main())
