"""Token files on disk: reading, writing, manifest and journal."""
