"""`titan-peer COMMAND`: one thin file per command, which parses its flags, calls the library and prints.

What a command imports at the top is light (no torch, numpy or matplotlib): help and a mistake in a flag, key or path
are answered within a fraction of a second. The library is imported where it is called, after everything that can be
checked without it.
"""
