"""declip's built-in sets of drawings and small photographs, as the sources ``builtin:NAME``."""

NAMES = (
    "clipart",
    "emoji",
    "emoji-share-alike",
    "emoji-test",
    "emoji-test-new",
    "emoji-validation",
    "emoji-validation-new",
    "icons",
    "icons-test",
    "icons-validation",
    "stamps",
    "stamps-kinds",
    "stamps-kinds-train",
    "stamps-photos",
)
"""Known before anything is imported, so that others are refused at once."""
