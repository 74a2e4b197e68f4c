"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and Trackio, each offline unless the user asks."""

import importlib
import json
import os
import posixpath
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

from declip.errors import UserError
from declip.interchange.weights import one_line
from declip.io.atomic import atomic_write
from declip.recipe.load import read_yaml
from declip.runs.folder import TRACKING, Run, flat, log
from declip.training.sinks import Sink, Stretch

AUTO = "auto"
"""The name in train.report_to that means TensorBoard where it is installed."""


class Tracker(Sink):
    """A sink that sends numbers to a library for experiment tracking.

    A subclass has `open`, `send` and `finish`. Their errors never end a run: one warning, and the tracker is left out
    from then on. Only a tracker that cannot be opened is an error of the user's.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    """The module whose import shows that the library is installed."""
    environment: ClassVar[Mapping[str, str]] = {}
    """Variables set before the import, unless the user has set them."""

    def open(self, stretch: Stretch) -> None:
        """Begin the run there, or continue it."""
        raise NotImplementedError

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send numbers by name, such as "train/loss"."""
        raise NotImplementedError

    def finish(self, failed: bool) -> None:
        """End the run there; `failed` says that an error ended it."""
        raise NotImplementedError

    def start(self, stretch: Stretch) -> None:
        self._broken = False
        try:
            self.open(stretch)
        except Exception as error:  # each library has errors of its own
            raise UserError(
                f"train.report_to={self.name} cannot start: {one_line(error, 200)}. Fix its settings, or leave it out."
            ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {f"train/{name}": values[name] for name in ("loss", "grad_norm", "lr", "logit_scale")}
        numbers |= {f"train/{name}": value for name, value in values["losses"].items()}
        if values["samples_per_second"] is not None:
            numbers["speed/samples_per_second"] = values["samples_per_second"]
        self._attempt(self.send, step, numbers)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        place = f"{values['dataset']}/{values['task']}"
        numbers = {f"{place}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self._attempt(self.send, step, numbers)

    def close(self) -> None:
        self._attempt(self.finish, sys.exc_info()[0] is not None)

    def _attempt(self, call: Callable[..., None], *arguments: object) -> None:
        if self._broken:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._broken = True
            log.warning("%s takes no more numbers (%s); metrics.jsonl has them all.", self.name, one_line(error, 200))


class TensorBoard(Tracker):
    """Event files in the run folder."""

    name, module = "tensorboard", "torch.utils.tensorboard"

    def open(self, stretch: Stretch) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(stretch.folder / "tensorboard"), purge_step=stretch.start + 1)

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._attempt(self._writer.flush)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class WandB(Tracker):
    """Weights & Biases: a folder for `wandb sync`, or online where WANDB_MODE=online asks for it."""

    name, module = "wandb", "wandb"
    environment: ClassVar[Mapping[str, str]] = {"WANDB_ERROR_REPORTING": "false"}

    def open(self, stretch: Stretch) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "declip"),
            name=stretch.folder.resolve().name,
            id=kept_id(stretch.folder, self.name, lambda: uuid.uuid4().hex[:12]),
            resume="allow" if mode == "online" else None,  # offline the id alone joins the parts
            dir=stretch.folder,
            mode=mode,
            config=_recipe(stretch.folder),
            settings=wandb.Settings(console="off", silent=stretch.quiet),  # the bar's lines stay ours
        )

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """MLflow: the folder mlruns in the run folder, or the server that MLFLOW_TRACKING_URI names."""

    name, module = "mlflow", "mlflow"
    # Since version 3.7 it refuses folders without the first; the second keeps it off the network.
    environment: ClassVar[Mapping[str, str]] = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def open(self, stretch: Stretch) -> None:
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or (stretch.folder.resolve() / "mlruns").as_uri()
        self._client = MlflowClient(tracking_uri=place)
        self._id = kept_id(stretch.folder, self.name, lambda: self._create(stretch.folder))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, folder: Path) -> str:
        from mlflow.entities import Param

        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "declip")
        experiment = self._client.get_experiment_by_name(title)
        where = experiment.experiment_id if experiment else self._client.create_experiment(title)
        identity: str = self._client.create_run(where, run_name=folder.resolve().name).info.run_id
        params = [Param(key, str(value)) for key, value in flat(_recipe(folder)).items()]
        self._client.log_batch(identity, params=params)
        return identity

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, [Metric(_as_path(name), value, now, step) for name, value in numbers.items()])

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """Trackio: its database on this machine, or the Space that TRACKIO_SPACE_ID names."""

    name, module = "trackio", "trackio"

    def open(self, stretch: Stretch) -> None:
        import trackio

        name = stretch.folder.resolve().name
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "declip"),
                name=kept_id(stretch.folder, self.name, lambda: f"{name}-{uuid.uuid4().hex[:6]}"),
                resume="allow",
                config=flat(_recipe(stretch.folder)),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self, failed: bool) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()


TRACKERS: Mapping[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, MLflow, Trackio)}
"""Every name of train.report_to but `AUTO`."""


def trackers_of(report_to: Sequence[str]) -> list[Tracker]:
    """Make the trackers that train.report_to names; of `AUTO`, TensorBoard where it is installed."""
    names = dict.fromkeys("tensorboard" if name == AUTO else name for name in report_to)
    return [TRACKERS[name]() for name in names if _installed(TRACKERS[name])]


def require_trackers(report_to: Sequence[str]) -> None:
    """Refuse a tracker whose library is not installed."""
    for name in report_to:
        if name != AUTO and not _installed(TRACKERS[name]):
            raise UserError(
                f"train.report_to={name} needs a package that is not installed: pip install 'declip[{name}]', or leave "
                f"{name} out."
            )


def kept_id(folder: Path, name: str, create: Callable[[], str]) -> str:
    """Give the id of the run in a tracker: the one in the run folder, or a new one, which is kept there."""
    path = folder / TRACKING
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in ids:
        ids[name] = create()
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(ids, indent=1), encoding="utf-8")
    return ids[name]


def _as_path(name: str) -> str:
    """Make a name that MLflow takes: a relative path of letters, digits, "_", "-", "." and spaces."""
    return posixpath.normpath("/" + re.sub(r"[^\w.\- /]", "_", name)).lstrip("/")


def _installed(kind: type[Tracker]) -> bool:
    for variable, value in kind.environment.items():
        os.environ.setdefault(variable, value)
    try:
        importlib.import_module(kind.module)
    except ImportError:
        return False
    return True


def _recipe(folder: Path) -> dict[str, Any]:
    return read_yaml(Run(folder).recipe_text) or {}
