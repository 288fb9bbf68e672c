"""Arrays in, arrays out: the arithmetic of the method, without files, Ray or models."""
