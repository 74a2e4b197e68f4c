"""The local web page: classify, search and pairs."""
