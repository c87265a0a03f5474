"""Text: files that contain it, read as one stream of documents."""
