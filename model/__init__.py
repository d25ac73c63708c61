"""The network and its mathematics: no Ray, and no input or output but weights."""
