"""The transformer that both engines build: one megatron-core layer spec, one set of names, one set of initial
weights.
"""
