"""What ``--help`` shows."""
