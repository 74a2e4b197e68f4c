"""The local web page: classify, search, neighbors, pairs and runs."""
