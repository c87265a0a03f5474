"""Proofs that two programs compute the same model: the numbers of one program, the other program in a
separate process, and the bounds.
"""
