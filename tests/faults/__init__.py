"""The fault suite: real programs, real servers and real faults; see `support` for what every test ends with."""
