"""JSON files in the folders of other libraries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file, {} if there is none."""
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as other libraries do."""
    text = json.dumps(content, indent=2)
    file.write_text(f"{text}\n", encoding="utf-8")
