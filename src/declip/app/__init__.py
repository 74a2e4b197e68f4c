"""The local web page: classify, search, neighbours, pairs and runs."""
