"""What the ranks of a layout hold: parameters and memory, part by part."""
