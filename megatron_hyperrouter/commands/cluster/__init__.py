"""Commands around a job on a cluster: before it, and while it runs."""
