"""Inspect a source of pairs before training: sizes, lengths, duplicates, broken pairs, leakage."""

from declip.inspection.result import Inspection
from declip.inspection.scan import inspect_source

__all__ = ["Inspection", "inspect_source"]
