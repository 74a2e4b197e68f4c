"""declip's built-in sets of drawings and small photographs, as the sources ``builtin:NAME``."""
