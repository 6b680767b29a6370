"""Doubles that the tests talk to over real HTTP, and the published schemas that keep them strict."""
