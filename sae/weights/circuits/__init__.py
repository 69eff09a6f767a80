"""Circuits: the smallest graph of a model's parts that keeps a behaviour, run as a graph."""
