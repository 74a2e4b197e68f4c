"""Experiment trackers, offline unless the user asks otherwise."""

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from declip.errors import UserError
from declip.io.atomic import write_text
from declip.io.plugins import load_plugin
from declip.io.text import one_line
from declip.io.yaml_dialect import read_yaml
from declip.runs.folder import TRACKING, Run, log
from declip.training.sinks import RunInfo, Sink

AUTO = "auto"  # the name in train.report_to that means TensorBoard where it is installed


class Tracker(Sink):
    """Base class of trackers: sinks whose `log` receives floats by flat names such as "train/loss".

    Results of evaluations come to `log` too, without counts such as n. A checkpoint is written after `flush`.
    """

    library: ClassVar[str]
    """The top-level module that must be installed."""


class TensorBoard(Tracker):
    """Event files in the run folder."""

    library = "tensorboard"

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
        # Read by the import; keeps it off the network
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
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
            # Standard error stays the progress bar's
            settings=wandb.Settings(console="off", silent=not info.progress),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # an error ends the run
        self._run.finish(exit_code=int(failed))


# By their name in train.report_to, which may also be that of a plugin
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


SCALARS = ("loss", "grad_norm", "lr", "logit_scale")  # of a logged row, besides the losses


class Tracked(Sink):
    """Sends a run's numbers to a tracker by flat names such as "train/loss".

    An error of the tracker's library never ends a run: after the first one the tracker gets no more numbers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._failed = False
        self.tracker = tracker_class(name)()

    def start(self, info: RunInfo) -> None:
        try:
            self.tracker.start(replace(info, folder=info.folder.resolve()))
        except Exception as error:  # each library has errors of its own
            raise UserError(
                f"train.report_to={self.name} cannot start: {one_line(error, 200)}. Fix its settings, or leave it out."
            ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {f"train/{name}": values[name] for name in SCALARS}
        numbers |= {f"train/{name}": value for name, value in values["losses"].items()}
        if values["samples_per_second"] is not None:
            numbers["speed/samples_per_second"] = values["samples_per_second"]
        self._attempt(self.tracker.log, step, numbers)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        prefix = f"{values['dataset']}/{values['task']}"
        numbers = {
            f"{prefix}/{name}": value for name, value in values.items() if isinstance(value, float)
        }
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
            reason = one_line(error, 200)
            log.warning(
                "%s gets no more numbers (%s); metrics.jsonl has them all.", self.name, reason
            )


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuse trackers of train.report_to whose package is not installed."""
    for name in report_to:
        if name != AUTO and not is_installed(tracker_class(name).library):
            raise UserError(
                f"train.report_to={name} needs a package: pip install 'declip[{name}]', or leave {name} out."
            )


def trackers_of(report_to: Sequence[str]) -> list[Tracked]:
    """Create the trackers of a list that passed `check_trackers`; for `AUTO`, TensorBoard if it is installed."""
    names = list(report_to)
    if AUTO in names:
        names.remove(AUTO)
        if is_installed(TensorBoard.library):
            names.insert(0, "tensorboard")
    return [Tracked(name) for name in dict.fromkeys(names)]


def tracker_class(name: str) -> type[Tracker]:
    """Return the class of a tracker of the package or of a plugin."""
    plugin: Any = TRACKERS.get(name) or load_plugin("trackers", name)
    tracker: type[Tracker] = plugin
    return tracker


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def kept_id(folder: Path, name: str, create: Callable[[], str]) -> str:
    """Read the id of the run in a tracker from the run folder, or create one and save it there."""
    path = folder / TRACKING
    ids = dict[str, str]()
    if path.is_file():
        ids = json.loads(path.read_text(encoding="utf-8"))
    if name not in ids:
        ids[name] = create()
        write_text(path, json.dumps(ids, indent=1))
    return ids[name]
