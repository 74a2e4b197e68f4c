"""Foreign formats, one file each: reading models from them and writing models in them."""
