"""DeepSpeed-MoE in the MLP slot of a transformer layer, and in models of callers."""
