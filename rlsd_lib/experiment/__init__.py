"""One run, from its parameters to its directory; the only room that sees all others."""
