"""Proofs that two programs compute the same model: one side's numbers, the other side in a process of its
own, and the bounds.
"""
