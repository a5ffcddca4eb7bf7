"""The page of `pinrec demo`: a history, dials, candidates, and why the list is what it is. Extra `demo`."""
