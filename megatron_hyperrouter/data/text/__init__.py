"""Text: files that hold it, read as one stream of documents."""
