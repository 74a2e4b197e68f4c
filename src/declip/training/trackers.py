"""Experiment trackers, offline unless the user asks otherwise."""

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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from declip.errors import UserError
from declip.io.atomic import write_text
from declip.io.plugins import load_plugin
from declip.io.text import one_line, read_yaml
from declip.recipe.load import flat
from declip.runs.folder import TRACKING, Run, log
from declip.training.sinks import RunInfo, Sink

AUTO = "auto"  # the name in train.report_to that means TensorBoard where it is installed

# Set before the imports, unless the user has set them. Since version 3.7 MLflow refuses folders without the second; the
# others keep the libraries off the network.
VARIABLES = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Tracker(Sink):
    """Base class of trackers: sinks whose `log` receives floats by flat names such as "train/loss".

    Results of evaluations come to `log` too, without counts such as n. A checkpoint is written after `flush`.
    """

    library: ClassVar[str]
    """The module that must be installed."""


class TensorBoard(Tracker):
    """Event files in the run folder."""

    library = "torch.utils.tensorboard"

    def start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(info.folder / "tensorboard"), purge_step=info.start + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # else a run that is killed and resumed has a gap

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """A folder for `wandb sync`, or online where WANDB_MODE=online asks for it."""

    library = "wandb"

    def start(self, info: RunInfo) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "declip"),
            name=info.folder.name,
            id=kept_id(info.folder, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow" if mode == "online" else None,  # offline the id alone joins the parts
            dir=info.folder,
            mode=mode,
            config=read_yaml(Run(info.folder).recipe_text),
            settings=wandb.Settings(console="off", silent=info.quiet),  # standard error stays the progress bar's
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))  # whether an error ends the run


class MLflow(Tracker):
    """The folder mlruns in the run folder, or the server that MLFLOW_TRACKING_URI names."""

    library = "mlflow"

    def start(self, info: RunInfo) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (info.folder / "mlruns").as_uri())
        self._run = kept_id(info.folder, "mlflow", partial(self._create, info.folder))
        self._client.update_run(self._run, status="RUNNING")

    def _create(self, folder: Path) -> str:
        from mlflow.entities import Param

        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "declip")
        known = self._client.get_experiment_by_name(title)
        where = known.experiment_id if known else self._client.create_experiment(title)
        run: str = self._client.create_run(where, run_name=folder.name).info.run_id
        self._client.log_batch(run, params=[Param(key, str(value)) for key, value in _keys(folder).items()])
        return run

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        # A metric's name must be a relative path of letters, digits, "_", "-", "." and spaces.
        names = (posixpath.normpath("/" + re.sub(r"[^\w.\- /]", "_", name)).lstrip("/") for name in values)
        metrics = zip(names, values.values(), strict=True)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in metrics])

    def close(self) -> None:
        self._client.set_terminated(self._run, "FINISHED" if sys.exc_info()[0] is None else "FAILED")


class Trackio(WandB):
    """Trackio's database on this machine, or the Space that TRACKIO_SPACE_ID names."""

    library = "trackio"

    def start(self, info: RunInfo) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "declip"),
                name=kept_id(info.folder, "trackio", lambda: f"{info.folder.name}-{uuid.uuid4().hex[:6]}"),
                resume="allow",
                config=_keys(info.folder),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def close(self) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()


# By their name in train.report_to, which may also be that of a plugin
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


class Tracked(Sink):
    """Sends a run's numbers to a tracker by flat names such as "train/loss".

    An error of the tracker's library never ends a run: after the first one the tracker gets no more numbers.
    """

    def __init__(self, name: str) -> None:
        self.name, self._failed = name, False
        self.tracker: Tracker = (TRACKERS.get(name) or load_plugin("trackers", name))()
        importlib.import_module(self.tracker.library)

    def start(self, info: RunInfo) -> None:
        try:
            self.tracker.start(replace(info, folder=info.folder.resolve()))
        except Exception as error:  # each library has errors of its own
            raise UserError(
                f"train.report_to={self.name} cannot start: {one_line(error, 200)}. Fix its settings, or leave it out."
            ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: values[name] for name in ("loss", "grad_norm", "lr", "logit_scale")} | values["losses"]
        numbers = {f"train/{name}": value for name, value in numbers.items()}
        if values["samples_per_second"] is not None:
            numbers["speed/samples_per_second"] = values["samples_per_second"]
        self._attempt(self.tracker.log, step, numbers)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        prefix = f"{values['dataset']}/{values['task']}"
        numbers = {f"{prefix}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self._attempt(self.tracker.log, step, numbers)

    def flush(self) -> None:
        self._attempt(self.tracker.flush)

    def close(self) -> None:
        self._attempt(self.tracker.close)

    def _attempt(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            if not self._failed:
                call(*arguments)
        except Exception as error:
            self._failed = True
            log.warning("%s gets no more numbers (%s); metrics.jsonl has them all.", self.name, one_line(error, 200))


def trackers_of(report_to: Sequence[str]) -> list[Tracked]:
    """Create the trackers that train.report_to names; for `AUTO`, TensorBoard if it is installed."""
    os.environ.update(VARIABLES | os.environ)
    trackers = {}
    for name in ("tensorboard" if name == AUTO else name for name in report_to):
        try:
            trackers[name] = Tracked(name)
        except ImportError as error:
            if name in report_to:
                raise UserError(
                    f"train.report_to={name} needs a package: pip install 'declip[{name}]', or leave {name} out."
                ) from error
    return list(trackers.values())


def kept_id(folder: Path, name: str, create: Callable[[], str]) -> str:
    """Read the id of the run in a tracker from the run folder, or create one and save it there."""
    path = folder / TRACKING
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in ids:
        ids[name] = create()
        write_text(path, json.dumps(ids, indent=1))
    return ids[name]


def _keys(folder: Path) -> dict[str, Any]:
    return flat(read_yaml(Run(folder).recipe_text))
