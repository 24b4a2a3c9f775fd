"""The shard loop on the machines of a Ray cluster, by an autoscaling pool of Ray Data.

A row of the data set is the number of a shard, and what comes back of it is a tally: images and columns never
go through Ray's object store. Each worker lists the images itself, loads the models once, and writes shards
and commits straight into the cache, as any process of `work` does.

A worker that is lost loses the shard that it was at, and Ray gives that to another.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.format.opening import differences
from ...data.writing.writer import ShardTakenError
from ..plan import make_plan, present_manifest
from ..source_plan import missing_shards
from .interrupts import terminated_as_interrupt
from .worker import Job, Tally, prepare_models, write_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ...data.format.manifest import Manifest
    from ..columns.models import SourceModel
    from ..config import PreprocessConfig
    from ..plan import Plan
    from .worker import Report

MOST_TRIES = 100
"""Times that one shard is given out again, so that one that ends every worker ends the run at last.

A machine that vanishes takes several of them: Ray tries to reach it until it is known to be dead.
"""

_MOST_DECODERS = 16
_PATIENCE_SECONDS = 180.0  # locks of a machine that has gone last as long as the file system's lease
_WAIT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class RayPool:
    """Workers that Ray is asked for.

    Attributes:
        least: workers, from the start.
        most: workers; None: as many as there are shards to do. Ray has no more than the cluster gives.
        gpus: of a worker, of which it may have a share; None: one if the cluster has any, else 0.
        cpus: of a worker; None: the cluster's for each GPU, at most 17; one without GPUs.
    """

    least: int = 1
    most: int | None = None
    gpus: float | None = None
    cpus: int | None = None

    def on(self, resources: Mapping[str, float]) -> tuple[float, int]:
        """Return the GPUs and CPUs of a worker of a cluster.

        Args:
            resources: of the cluster, as Ray counts them.
        """
        there = resources.get("GPU", 0.0)
        gpus = self.gpus if self.gpus is not None else float(there >= 1)
        if self.cpus is not None:
            return gpus, self.cpus
        if not gpus or not there:
            return gpus, 1
        return gpus, max(1, min(_MOST_DECODERS + 1, int(resources.get("CPU", 1.0) * gpus / there)))


def work_on_ray(plan: Plan, pool: RayPool, report: Report, note: Callable[[str], None]) -> list[Tally]:
    """Have the missing shards of a plan computed and written by the workers of a Ray cluster.

    The cluster is the one that ``RAY_ADDRESS`` names, or that runs on this machine, or one that is started on
    it for this call.

    Args:
        plan: what is left to do.
        pool: the workers.
        report: called here after each shard, see `work`.
        note: called with what the user should know.

    Returns:
        The tally of each worker.

    Raises:
        RepaError: Ray is not installed or cannot be reached, a worker cannot do its work, or a shard has lost
            too many of them; committed shards stay.
    """
    ray = _import_ray()
    missing = frozenset[int]().union(*(source.missing for source in plan.sources))
    sources = tuple(source.source for source in plan.sources if source.missing)
    shards = [shard for shard in plan.share if shard in missing]
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    # Ray has put a handler of its own in the place of the command's
    with _connected(ray), terminated_as_interrupt(), _as_repa_error(ray):
        gpus, cpus = pool.on(ray.cluster_resources())
        if not _has_room(ray.nodes(), gpus, cpus):
            note(
                f"no machine of the cluster has {gpus:g} GPUs and {cpus} CPUs: this waits until one joins it"
            )
        for row in _rows(ray, plan, sources, shards, pool, gpus, cpus):
            answer = json.loads(row["answer"])
            if "error" in answer:
                what, remedy, field = answer["error"]
                raise RepaError(f"shard {row['shard']} on {answer['machine']}: {what}", remedy, field=field)
            report(answer["rows"], answer["images"])
            _add(tallies[answer["worker"]], answer["tally"])
    return list(tallies.values())


def _rows(
    ray: Any,
    plan: Plan,
    sources: Sequence[str],
    shards: Sequence[int],
    pool: RayPool,
    gpus: float,
    cpus: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shard that is done, in the order that they are."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there are our own
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = max(pool.least, min(len(shards), pool.most or len(shards)))
    settings = {"config": replace(plan.config, shards=None), "manifest": plan.manifest, "sources": sources}
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        # the only way to say `_retried` until Ray 2.64, which the extra leaves out
        warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
        done = rows.map_batches(
            EncodeShard,
            batch_size=1,
            fn_constructor_kwargs={**settings, "gpus": gpus, "cpus": cpus, "folder": os.getcwd()},
            compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=most),
            num_gpus=gpus,
            num_cpus=cpus,
            ray_remote_args_fn=_retried,
        )
    yield from done.iter_rows()


def _retried() -> dict[str, Any]:
    """Return how often Ray starts a worker again, and gives out the shard that one was lost at."""
    return {"max_restarts": -1, "max_task_retries": MOST_TRIES}


class EncodeShard:
    """What a worker of Ray does, for shard after shard.

    Args:
        config: the command, resolved.
        manifest: of the cache, the sources left out, as its starter sees it.
        sources: those that miss a shard.
        gpus: that Ray gives it.
        cpus: that Ray gives it.
        folder: where the command was given, which its relative paths are of.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        manifest: Manifest,
        sources: Sequence[str],
        gpus: float,
        cpus: int,
        folder: str,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._sources = tuple(sources)
        self._gpus = gpus
        self._cpus = cpus
        self._folder = folder
        self._plan: Plan | None = None
        self._models: list[SourceModel] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Do a shard.

        Args:
            batch: one row, ``shard``.

        Returns:
            One row: ``shard``, and ``answer``, JSON of what was done or of the error that the user can mend.
        """
        shard = int(batch["shard"][0])
        rows: Counter[str] = Counter()
        answer: dict[str, Any] = {"worker": f"{os.uname().nodename}:{os.getpid()}", "rows": rows}

        def report(done: Mapping[str, int], images: int) -> None:
            rows.update(done)

        try:
            tally = self._do(shard, report)
        except RepaError as error:
            answer |= {"error": [error.what, error.remedy, error.field], "machine": os.uname().nodename}
        else:
            # reasons are in the commit record
            tally.written.invalid = {}
            answer |= {"images": tally.images, "tally": asdict(tally)}
        return {"shard": [shard], "answer": [json.dumps(answer)]}

    def _do(self, shard: int, report: Report) -> Tally:
        """Write what is missing of a shard, waiting for the locks of a worker that has gone."""
        job, plan = self._prepare()
        tally = Tally()
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            present = present_manifest(job.config.cache)
            missing = {
                name: missing_shards(job.config.cache, present, name, (shard,)) for name in self._sources
            }
            if not any(missing.values()):
                return tally  # it was committed before its worker was lost
            if self._models is None:
                self._models = prepare_models(job, plan.images, self._sources, tally)
            try:
                write_columns(job, plan.images, self._models, missing, report, tally)
            except ShardTakenError:
                if time.monotonic() > end:
                    raise
                time.sleep(_WAIT_SECONDS)
            else:
                return tally

    def _prepare(self) -> tuple[Job, Plan]:
        """Look at images and cache from this machine.

        Raises:
            RepaError: they are not here, or others than where the command was given; there is no GPU.
        """
        import torch

        if self._plan is None:
            try:
                os.chdir(self._folder)
            except OSError as error:
                raise RepaError(
                    f"{self._folder}, where the command was given, cannot be entered: {error.strerror}",
                    "give the command in a folder that every machine has",
                ) from error
            plan = make_plan(self._config)
            different = differences(plan.manifest.fixed(), self._manifest.fixed())
            if different:
                raise RepaError(
                    f"this machine sees other images than the one of the command: {different}",
                    "put the images where every machine sees the same",
                    field="--data",
                )
            self._plan = plan
        if self._gpus and not torch.cuda.is_available():
            raise RepaError(
                f"Ray gave the worker {self._gpus:g} GPUs, and PyTorch sees none",
                "install PyTorch for the GPU there, or give --worker-gpus 0",
                field="--worker-gpus",
            )
        workers = self._config.workers
        if workers is None:
            workers = min(_MOST_DECODERS, self._cpus - 1) if self._gpus else 0
        job = Job(
            config=self._plan.config,
            manifest=self._plan.manifest,
            share=self._plan.share,
            rank=0,
            world=1,
            # Ray shows a worker its own GPUs alone
            device="cuda:0" if self._gpus else "cpu",
            threads=self._cpus,
            workers=workers,
        )
        return job, self._plan


def _add(total: Tally, more: Mapping[str, Any]) -> None:
    """Add what a worker did of a shard to what it has done."""
    written = more["written"]
    for name in ("rows", "bytes", "busy_seconds"):
        mine = getattr(total.written, name)
        for key, value in written[name].items():
            mine[key] = mine.get(key, 0) + value
    total.written.write_seconds += written["write_seconds"]
    for name in ("images", "load_seconds", "calibrate_seconds", "loop_seconds", "decode_seconds"):
        setattr(total, name, getattr(total, name) + more[name])
    total.lanes = max(total.lanes, more["lanes"])


def _has_room(nodes: Sequence[Mapping[str, Any]], gpus: float, cpus: int) -> bool:
    """Return whether a worker fits on some machine that is there."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return any(each.get("GPU", 0.0) >= gpus and each.get("CPU", 0.0) >= cpus for each in alive)


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RepaError(
            f"--launcher ray needs Ray Data, which is not installed ({error})",
            "install it with `pip install 'repa[ray]'`",
            field="--launcher",
        ) from error
    return ray


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Be a client of the cluster in this block, which ends with it unless there was one before."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RepaError(
            f"Ray cannot be reached: {first}",
            "start it with `ray start --head`, or name its head in RAY_ADDRESS",
            field="--launcher",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _as_repa_error(ray: Any) -> Iterator[None]:
    """Say in one line what Ray gave the work up for."""
    try:
        yield
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RepaError(
            f"Ray gave up: {lines[-1].strip() if lines else type(error).__name__}",
            "what was committed is kept, and the same command resumes; `ray logs` says what ended a worker",
        ) from error
