"""The local web page: search, wrong pairs and captioning."""
