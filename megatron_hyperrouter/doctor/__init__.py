"""Examines the machines of a job before it trains: versions, speed, network, clocks and the run folder."""
