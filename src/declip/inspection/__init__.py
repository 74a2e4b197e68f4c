"""What a person wants to know about their own pairs before they train on them."""

from declip.inspection.result import Inspection
from declip.inspection.scan import inspect_source

__all__ = ["Inspection", "inspect_source"]
