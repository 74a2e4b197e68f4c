"""Reading and writing models in the formats of other libraries, one file per format."""
