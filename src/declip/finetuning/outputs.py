"""What a finished run of gradient steps writes for its user: exports and the report."""

from pathlib import Path

from declip.evaluation.held_out import HeldOutSets
from declip.interchange.export import export_complete, with_provenance
from declip.models.encoder import Encoder
from declip.reports.run import write_report


def write_finetuned(folder: Path, model: Encoder, held_out: HeldOutSets) -> None:
    """Export the model of a finished run to every format that holds it, and write the report."""
    # Without adapters, and complete where it was sharded; loaded once for all formats
    export_complete(with_provenance(folder), folder / "exported")
    write_report(folder, model, held_out=held_out)
