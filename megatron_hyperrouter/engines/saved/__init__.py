"""What a rank saves and loads: weights, optimizer state and generators, on any layout of any engine."""
