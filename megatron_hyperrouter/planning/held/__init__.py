"""Parameters and memory of each rank of a layout, by parts."""
