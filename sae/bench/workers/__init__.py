"""One file a contestant, each the main program of a process of its own; protocol.py is what they share."""
