"""Text files, read as one stream of documents."""
