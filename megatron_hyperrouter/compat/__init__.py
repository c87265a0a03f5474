"""Every patch of a host, each with the host's version, file and line, the reason, and a test that fails when
it is no longer needed.

No patch acts where a GPU makes it needless.
"""
