"""Parameters and memory of the ranks of a layout, part by part."""
