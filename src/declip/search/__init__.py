"""An index of images, and searching it."""
