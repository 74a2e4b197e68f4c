"""What a finished fine-tuning writes for its user: exports and the report."""

from pathlib import Path

from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.interchange.export import export, trace
from declip.interchange.format import Refusal, Traced
from declip.models.image_tower import PosteriorProjection
from declip.reports.run import write_report
from declip.runs.folder import log
from declip.training.evaluations import HeldOutSets


def write_finetuned(folder: Path, model: Encoder, held_out: HeldOutSets, merged: Traced | None = None) -> None:
    """Export the model of a finished run to every format that holds it whole, and write the report.

    Class posteriors are in no linear projection: `declip export` says what a format of such loses. The report is last:
    a fit in closed form that has one is finished.
    """
    # Without adapters, and whole where it was sharded; loaded once for all formats
    merged = merged or trace(folder)
    whole = not isinstance(merged.model.image_tower.proj, PosteriorProjection)
    for format in ("safetensors", *(("open_clip", "huggingface") if whole else ())):
        try:
            export(merged, format, folder / "exported" / format, overwrite=True)
        except Refusal:
            continue
        except UserError as error:  # the run is whole without it
            log.warning(str(error))
    write_report(folder, model, held_out=held_out)
