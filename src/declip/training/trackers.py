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
from typing import Any

from declip.errors import UserError
from declip.interchange.weights import one_line
from declip.io.atomic import write_text
from declip.recipe.load import flat, read_yaml
from declip.runs.folder import TRACKING, Run, log
from declip.training.sinks import RunInfo, Sink

AUTO = "auto"
"""The name in train.report_to that means TensorBoard where it is installed."""

# Since version 3.7 MLflow refuses folders without the second; the others keep the libraries off the network.
VARIABLES = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Set before the imports, unless the user has set them."""

Send = Callable[[int, dict[str, float]], None]
"""Sends the numbers of a step by name, such as "train/loss"."""
Finish = Callable[[bool], None]
"""Ends the run in a tracker; the argument says whether an error ended it."""


def open_tensorboard(folder: Path, info: RunInfo) -> tuple[Send, Finish]:
    """Write event files into the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=info.start + 1)

    def send(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # else a run that is killed and resumed has a gap

    return send, lambda failed: writer.close()


def open_wandb(folder: Path, info: RunInfo) -> tuple[Send, Finish]:
    """Write a folder for `wandb sync`, or send online where WANDB_MODE=online asks for it."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "declip"),
        name=folder.name,
        id=kept_id(folder, "wandb", lambda: uuid.uuid4().hex[:12]),
        resume="allow" if mode == "online" else None,  # offline the id alone joins the parts
        dir=folder,
        mode=mode,
        config=_recipe(folder),
        settings=wandb.Settings(console="off", silent=info.quiet),  # the bar's lines stay ours
    )
    return lambda step, numbers: run.log(numbers, step=step), lambda failed: run.finish(exit_code=int(failed))


def open_mlflow(folder: Path, info: RunInfo) -> tuple[Send, Finish]:
    """Write the folder mlruns in the run folder, or send to the server that MLFLOW_TRACKING_URI names."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri())

    def create() -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "declip")
        experiment = client.get_experiment_by_name(title)
        where = experiment.experiment_id if experiment else client.create_experiment(title)
        identity: str = client.create_run(where, run_name=folder.name).info.run_id
        client.log_batch(identity, params=[Param(key, str(value)) for key, value in flat(_recipe(folder)).items()])
        return identity

    run = kept_id(folder, "mlflow", create)
    client.update_run(run, status="RUNNING")

    def send(step: int, numbers: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        # It takes names that are relative paths of letters, digits, "_", "-", "." and spaces.
        names = (posixpath.normpath("/" + re.sub(r"[^\w.\- /]", "_", name)).lstrip("/") for name in numbers)
        metrics = zip(names, numbers.values(), strict=True)
        client.log_batch(run, [Metric(name, value, now, step) for name, value in metrics])

    return send, lambda failed: client.set_terminated(run, "FAILED" if failed else "FINISHED")


def open_trackio(folder: Path, info: RunInfo) -> tuple[Send, Finish]:
    """Write into Trackio's database on this machine, or send to the Space that TRACKIO_SPACE_ID names."""
    import trackio

    with redirect_stdout(sys.stderr):
        run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "declip"),
            name=kept_id(folder, "trackio", lambda: f"{folder.name}-{uuid.uuid4().hex[:6]}"),
            resume="allow",
            config=flat(_recipe(folder)),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def finish(failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    return lambda step, numbers: run.log(numbers, step=step), finish


TRACKERS: dict[str, tuple[str, Callable[[Path, RunInfo], tuple[Send, Finish]]]] = {
    "tensorboard": ("torch.utils.tensorboard", open_tensorboard),
    "wandb": ("wandb", open_wandb),
    "mlflow": ("mlflow", open_mlflow),
    "trackio": ("trackio", open_trackio),
}
"""For every name of train.report_to but `AUTO`: a module of the library, and how to begin or continue a run in it."""


class Tracker(Sink):
    """A sink that sends numbers to a library, whose errors never end a run: after one, the tracker is left out."""

    def __init__(self, name: str) -> None:
        self.name, self._broken = name, False

    def start(self, info: RunInfo) -> None:
        try:
            self._send, self._finish = TRACKERS[self.name][1](info.folder.resolve(), info)
        except Exception as error:  # each library has errors of its own
            raise UserError(
                f"train.report_to={self.name} cannot start: {one_line(error, 200)}. Fix its settings, or leave it out."
            ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: values[name] for name in ("loss", "grad_norm", "lr", "logit_scale")} | values["losses"]
        numbers = {f"train/{name}": value for name, value in numbers.items()}
        if values["samples_per_second"] is not None:
            numbers["speed/samples_per_second"] = values["samples_per_second"]
        self._attempt(self._send, step, numbers)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        place = f"{values['dataset']}/{values['task']}"
        numbers = {f"{place}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self._attempt(self._send, step, numbers)

    def close(self) -> None:
        self._attempt(self._finish, sys.exc_info()[0] is not None)

    def _attempt(self, call: Callable[..., None], *arguments: object) -> None:
        if self._broken:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._broken = True
            log.warning("%s takes no more numbers (%s); metrics.jsonl has them all.", self.name, one_line(error, 200))


def trackers_of(report_to: Sequence[str]) -> list[Tracker]:
    """Make the trackers that train.report_to names; of `AUTO`, TensorBoard where it is installed."""
    names = dict.fromkeys("tensorboard" if name == AUTO else name for name in report_to)
    return [Tracker(name) for name in names if _installed(name)]


def require_trackers(report_to: Sequence[str]) -> None:
    """Refuse a tracker whose library is not installed."""
    for name in report_to:
        if name != AUTO and not _installed(name):
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
        write_text(path, json.dumps(ids, indent=1))
    return ids[name]


def _installed(name: str) -> bool:
    for variable, value in VARIABLES.items():
        os.environ.setdefault(variable, value)
    try:
        importlib.import_module(TRACKERS[name][0])
    except ImportError:
        return False
    return True


def _recipe(folder: Path) -> dict[str, Any]:
    return read_yaml(Run(folder).recipe_text) or {}
