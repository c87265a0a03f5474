"""The health of a run: charts of its measures, ranks that delay the others, and what follows."""
