"""Whether layouts train the same model."""
