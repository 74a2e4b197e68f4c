"""Which icon sets are used, and which designers are kept for measuring.

Prefixes are those of `@iconify/json` 2.2.535. A set that a later version adds is trained on, so the version is fixed.
"""

import re
from collections.abc import Mapping
from typing import Any

TEST = ("carbon", "iconoir", "icon-park", "icon-park-solid", "flat-color-icons")
"""IBM, Luca Burgio, ByteDance and Icons8: one-colour and coloured, Apache-2.0 and MIT."""

VALIDATION = ("bi", "healthicons", "marketeq")
"""The Bootstrap authors, Resolve to Save Lives and Marketeq: one-colour and coloured, MIT."""

FURTHER_STYLES = ("icon-park-outline", "icon-park-twotone", "icons8", "wpf", "la")
"""By the designers of test sets, and therefore not trained on either."""

OLD = (
    "fa", "fa-solid", "fa-regular", "fa-brands", "fa6-solid", "fa6-regular", "fa6-brands", "bx", "bxs", "bxl", "ic",
    "material-symbols-light", "feather", "heroicons-outline", "heroicons-solid", "pepicons", "pepicons-print",
    "mono-icons", "streamline-guidance",
)  # fmt: skip
"""Old versions, or further weights, of sets that are used."""

LOGOS = (
    "devicon", "devicon-line", "devicon-original", "devicon-plain", "skill-icons", "vscode-icons",
    "material-icon-theme", "file-icons", "catppuccin", "gcp", "unjs", "k8s", "academicons", "ginetex",
)  # fmt: skip
"""Mostly other companies' trademarks, though their category does not say so."""

EMOJI = ("fluent-emoji",)
FLAGS = ("flag", "circle-flags", "flagpack", "cif")
UNREADABLE = ("whh", "medical-icon", "wi")
"""Names run together or numbered."""

RESTRICTED = re.compile(r"NC|ND|SA|GPL|MPL")
"""Licences that forbid commerce or changes, or ask that what is made of the art has the same licence."""


def reason_to_leave_out(prefix: str, info: Mapping[str, Any]) -> str | None:
    """Why a set is not used, None when it is.

    Args:
        prefix: The set's short name.
        info: Its entry in `collections.json`.
    """
    category = info.get("category", "")
    lists = {
        "old version or further weight": OLD,
        "logos": LOGOS,
        "flags": FLAGS,
        "emoji": EMOJI,
        "names do not read as words": UNREADABLE,
        "designer of a test set": FURTHER_STYLES,
    }
    if category in ("Emoji", "Logos"):
        return category.lower()
    if RESTRICTED.search(licence_of(info)):
        return f"licence {licence_of(info)}"
    return next((reason for reason, prefixes in lists.items() if prefix in prefixes), None)


def licence_of(info: Mapping[str, Any]) -> str:
    """The SPDX name of a set's licence, else its title."""
    licence = info.get("license", {})
    return str(licence.get("spdx") or licence.get("title") or "unknown")


def split_of(prefix: str) -> str:
    """Which split a set belongs to: "train", "validation" or "test"."""
    return "test" if prefix in TEST else "validation" if prefix in VALIDATION else "train"
