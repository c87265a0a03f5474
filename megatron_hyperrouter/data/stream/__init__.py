"""What a run reads, step by step: datasets, mixes, the ledger, the loader."""
