"""What a person wants to know about their own pairs before they train on them."""

from declip.inspection.inspection import inspect_source
from declip.inspection.result import Inspection

__all__ = ["Inspection", "inspect_source"]
