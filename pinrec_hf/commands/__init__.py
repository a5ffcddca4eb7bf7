"""The commands of `pinrec`: arguments in, library calls, tables or JSON out."""
