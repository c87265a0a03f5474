"""All patches of the hosts, each with the host's version, file and line, the reason, and a test that fails
when the patch is no longer needed.

A patch that a GPU makes unnecessary does nothing on a GPU.
"""
