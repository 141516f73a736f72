"""Claims: small experiments that put what a paper says of a method to the test, on two cores in about three minutes.

A claim is a function that returns a `Trial`: a task, a baseline, the method, and what must come out. Its docstring,
which is no part of the hash of its source, gives the claim in a sentence, then "Task:" what is trained on and
measured, then "Finding:" what came out and why.
"""
