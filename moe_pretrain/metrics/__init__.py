"""Metrics of a run: router statistics, throughput, and the files and services that get the rows."""
